"""Preview DGS: the threshold steers to the target acceptance, in small steps, and belongs in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import make_prompt
from torch import Tensor

from syncr1.engine.records import Prompt
from syncr1.engine.rollout.preview_gate import PreviewGate

PROMPTS = [make_prompt(str(index)) for index in range(4)]
TEXTS = [""] * 4
IMAGES = torch.zeros(4, 3, 2, 2)


def gate(
    scores: Sequence[float] = (0.1, 0.4, 0.6, 0.9),
    *,
    threshold: float | None = 0.5,
    acceptance: float = 0.25,
    dead_band: float = 0.0,
) -> PreviewGate:
    def scorer(prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        return torch.tensor(scores, dtype=torch.float64)

    return PreviewGate(
        scorer, fraction=0.5, threshold=threshold, acceptance=acceptance, max_attempts=3, dead_band=dead_band
    )


def test_accepts_above_the_threshold_and_never_nan() -> None:
    one = gate()
    assert one.accepts(one.score(PROMPTS, TEXTS, IMAGES)).tolist() == [False, False, True, True]
    assert one.accepts(torch.tensor([math.nan, -math.inf, 0.5, 1.0])).tolist() == [False, False, False, True]
    assert one.score(PROMPTS, TEXTS, IMAGES).dtype == torch.float32


@pytest.mark.parametrize(("accepted", "direction"), [(8, 1), (2, 0), (0, -1)])
def test_threshold_moves_towards_the_target(accepted: int, direction: int) -> None:
    """Too many accepted: it rises; too few: it falls; by the published rule, at most 0.005 a step."""
    one = gate()
    one.observe(accepted, 8)
    assert one.counts.tolist() == [accepted, 8]
    assert one.adapt() == accepted / 8
    wanted = 0.5 ** (1 + 0.12 * (0.25 - accepted / 8))
    assert one.threshold == pytest.approx(0.5 + max(-0.005, min(0.005, wanted - 0.5)))
    assert (one.threshold > 0.5) - (one.threshold < 0.5) == direction
    assert one.counts.tolist() == [0, 0], "the step's counts are forgotten"


@pytest.mark.parametrize(
    ("threshold", "accepted", "moved"),
    [
        (0.5, 15, 0.0),  # tau' - tau = .0041
        (0.7, 40, 0.0),  # .0045
        (0.5, 12, 0.005),  # .0054
        (0.5, 38, -0.005),  # -.0053
        (0.5, 0, 0.005),
        (0.5, 100, -0.005),
        (0.5, 25, 0.0),
    ],
)
def test_the_released_threshold_moves_by_its_step_or_stays(threshold: float, accepted: int, moved: float) -> None:
    """With a dead band of .005, for every acceptance rate; `moved` is against the sign of the rule's exponent."""
    one = gate(threshold=threshold, dead_band=0.005)
    one.observe(accepted, 100)
    one.adapt()
    assert one.threshold == pytest.approx(threshold - moved, abs=1e-12)
    wanted = threshold ** (1 + 0.12 * (0.25 - accepted / 100))
    assert (moved != 0.0) == (abs(wanted - threshold) > 0.005)
    today = gate(threshold=threshold)
    today.observe(accepted, 100)
    today.adapt()
    assert today.threshold == pytest.approx(threshold + max(-0.005, min(0.005, wanted - threshold)))


def test_a_dead_band_wider_than_any_move_holds_the_threshold() -> None:
    one = gate(dead_band=0.5)
    for accepted in (0, 100):
        one.observe(accepted, 100)
        one.adapt()
    assert one.threshold == 0.5


def test_threshold_settles_where_the_target_is_met() -> None:
    """Scores are uniform, so a quarter is accepted at 0.75."""
    one = gate(threshold=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        scores = torch.rand(64, generator=generator)
        one.observe(int(one.accepts(scores).sum()), 64)
        one.adapt()
    assert one.threshold == pytest.approx(0.75, abs=0.05)


def test_threshold_stays_in_its_range() -> None:
    high, low = gate(threshold=0.98), gate(threshold=0.02, acceptance=1.0)
    for _ in range(200):
        high.observe(8, 8)
        high.adapt()
        low.observe(0, 8)
        low.adapt()
    assert high.threshold == 0.99 and low.threshold == 0.01


def test_nothing_tried_changes_nothing() -> None:
    one = gate()
    assert math.isnan(one.adapt()) and one.threshold == 0.5
    one.observe(1, 1)
    assert one.adapt(3, 4) == 0.75, "counts over all ranks replace this rank's own"


def test_a_threshold_that_is_not_given_comes_from_the_first_previews() -> None:
    """The quantile at which the target is met; scores that cannot be judged take no part."""
    one = gate((0.1, 0.2, math.nan, 0.6), threshold=None, acceptance=0.5)
    assert not one.accepts(torch.tensor([0.0])).any() and math.isnan(one.adapt(1, 1))
    one.score(PROMPTS, TEXTS, IMAGES)
    assert one.threshold == pytest.approx(0.2)
    nothing = gate((math.nan,) * 4, threshold=None)
    nothing.score(PROMPTS, TEXTS, IMAGES)
    assert nothing.threshold is None


def test_state_continues_where_it_was_saved() -> None:
    one, other = gate(), gate(threshold=0.9)
    one.observe(5, 8)
    one.adapt()
    one.observe(1, 2)
    other.load_state_dict(one.state_dict())
    assert other.threshold == one.threshold and other.counts.tolist() == [1, 2]
    assert one.adapt() == other.adapt() and one.threshold == other.threshold


def test_a_scorer_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must return \[4\] scores, got \(3,\)"):
        gate((0.1, 0.2, 0.3)).score(PROMPTS, TEXTS, IMAGES)
