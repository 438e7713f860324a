"""caption.py: a description beside others of its kind, by a real model that has learnt a little of the world."""

from __future__ import annotations

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from made import short_base

from syncr1.engine.policies.auto import load_policy
from syncr1.engine.rewards.builtin.caption import CaptionContest, CaptionLikelihood
from syncr1.engine.rewards.judge.attribute_judge import CaptionJudge
from syncr1.engine.world.attributes import LOOKS, PLACES
from syncr1.engine.world.checker import AttributeChecker

ASKED = "where is the creature?"
ROWS = range(0, len(LOOKS), 41)


@pytest.fixture(scope="module")
def likelihood() -> CaptionLikelihood:
    return CaptionLikelihood(load_policy(short_base()).eval(), ASKED)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return AttributeChecker.raw_table()[list(ROWS)]


def test_right_pictures_lie_above_wrong_ones_on_a_scale(likelihood: CaptionLikelihood, pictures: torch.Tensor) -> None:
    """A picture's own place beats any other, by far; what is said of noise is near .5, where nothing is known."""
    judge = CaptionJudge(CaptionContest(likelihood, PLACES))
    images = list(pictures)
    right = [LOOKS[row].place for row in ROWS]
    own = judge(images=images, target=right)
    assert all(value is not None and 0 < value < 1 for value in own)
    values = torch.tensor([[v or 0.0 for v in judge(images=images, target=[place] * len(images))] for place in PLACES])
    mine = torch.tensor([v or 0.0 for v in own])
    others = values.sum(0).sub(mine) / (len(PLACES) - 1)
    assert float((mine > others).float().mean()) > 0.9 and float(mine.mean() - others.mean()) > 0.2
    assert values.mean() == pytest.approx(0.5, abs=0.05), "what one description wins, another loses"


def test_an_image_is_looked_at_once_whatever_is_said_of_it(
    likelihood: CaptionLikelihood, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptions of one image share its prompt on the packed axis: what one alone would have had."""
    texts = [["beach", "a round red creature at the beach", "forest"], ["desert", "beach", "moon"]]
    together = likelihood(pictures[:2], texts)
    assert together.shape == (2, 3) and bool((together < 0).all())
    for row, of_image in enumerate(texts):
        for column, text in enumerate(of_image):
            alone = likelihood(pictures[row : row + 1], [[text]])
            assert float(alone) == pytest.approx(float(together[row, column]), abs=1e-5)
    monkeypatch.setattr("syncr1.engine.rewards.builtin.caption.AT_ONCE", 1)
    assert torch.allclose(likelihood(pictures[:2], texts), together, atol=1e-5)


def test_others_are_like_it_and_always_the_same(likelihood: CaptionLikelihood, pictures: torch.Tensor) -> None:
    texts = ["a red dog at the beach", "a red cat at the beach", "a blue dog", "nothing alike", "a red dog in a car"]
    contest = CaptionContest(likelihood, texts, num_others=2)
    assert set(contest.others(texts[0])) == {texts[1], texts[4]}
    again = CaptionContest(likelihood, texts[::-1], num_others=2)
    assert all(again.others(text) == contest.others(text) for text in [*texts, "of no data"])
    assert texts[0] not in contest.others(texts[0]) and len(contest.others("of no data")) == 2
    few = CaptionContest(likelihood, texts[:2])
    values = few(pictures[:3], [texts[0], "of no data", " . "])
    assert values[:2].isfinite().all() and bool(values[2].isnan())
    for bad in ([], ["one", "one", "!"]):
        with pytest.raises(ValueError, match="at least two descriptions"):
            CaptionContest(likelihood, bad)
