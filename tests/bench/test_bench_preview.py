"""bench/preview.py: correlations by hand, every way to complete a picture keeps what is drawn, and the whole table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from helpers import CHAIN, ROOT, make_prompt, sharp_policy
from torch import Tensor

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt
from syncr1.engine.rollout.preview_gate import PreviewGate
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
try:
    import preview
finally:
    sys.path.remove(str(BENCH))

GROUP = 3


def brightness(prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def drawn(policy: JanusPolicy) -> preview.Drawn:
    """Rewarded by the finished picture's brightness."""
    prompts = [make_prompt("draw it.", CHAIN), make_prompt("draw this.", ("image",))]
    rollouts = generate(policy, prompts, Sampling(num_generations=GROUP, max_text_tokens=4))
    tokens = torch.stack([next(s.tokens for s in r.segments if s.kind == "image") for r in rollouts])
    return preview.Drawn(policy, rollouts, tokens, policy.draw(tokens).mean((1, 2, 3)), GROUP)


def test_correlations_by_hand() -> None:
    final = np.array([0.0, 1.0, 2.0, 5.0])
    assert preview.pearson(2 * final + 1, final) == pytest.approx(1.0)
    assert preview.spearman(np.exp(final), final) == pytest.approx(1.0)
    assert preview.spearman(-final, final) == pytest.approx(-1.0)
    assert preview.spearman(np.array([0.0, 0.0, 1.0, 1.0]), final) == pytest.approx(np.sqrt(0.8)), "ties share ranks"
    assert preview.pearson(np.ones(4), final) == 0.0, "previews that are all alike tell nothing"
    assert preview.best_of_two(final, final) == pytest.approx(1.0) and preview.best_of_two(-final, final) == -1.0
    assert preview.best_of_two(np.ones(4), final) == 0.0, "a tie is decided by nothing"


def test_groups_that_teach_nothing_and_members_that_failed_are_left_out() -> None:
    finals = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, np.nan, np.nan]])
    previews = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    assert preview.group_values(previews, finals, preview.pearson) == [pytest.approx(1.0)]
    low, high = preview.interval([0.1, 0.2, 0.3, 0.4])
    assert 0.1 <= low < 0.25 < high <= 0.4 and preview.interval([0.5] * 3) == (0.5, 0.5)


@pytest.mark.parametrize("way", preview.WAYS)
def test_every_way_keeps_what_is_drawn(drawn: preview.Drawn, way: str) -> None:
    for k in (1, 6, 8, 16):
        tokens = preview.WAYS[way](drawn, k)
        assert tokens.shape == drawn.tokens.shape and torch.equal(tokens[:, :k], drawn.tokens[:, :k])


def test_rows_below_by_hand(drawn: preview.Drawn) -> None:
    rows = drawn.tokens[0].view(4, 4).tolist()
    mirror, tile = (preview.WAYS[way](drawn, 8)[0].view(4, 4).tolist() for way in ("mirror", "tile"))
    assert mirror == [rows[0], rows[1], rows[1], rows[0]] and tile == [rows[0], rows[1], rows[0], rows[1]]
    images = preview.completed(drawn, 8, preview.PAINTED)
    half = images.shape[2] // 2
    assert torch.equal(images[:, :, :half], preview.completed(drawn, 8, "repeat")[:, :, :half])
    assert images[:, :, half:].flatten(2).std(-1).max() < 1e-6, "below it is one colour"


def test_likely_tokens_are_the_heads_own(policy: JanusPolicy) -> None:
    """Greedy drawings are their own most likely continuation, wherever they are cut: nothing is off by one."""
    rollouts = generate(policy, [make_prompt("draw it.", CHAIN)], Sampling(num_generations=2, temperature=1e-4))
    tokens = torch.stack([next(s.tokens for s in r.segments if s.kind == "image") for r in rollouts])
    drawn = preview.Drawn(policy, rollouts, tokens, torch.zeros(2), 2)
    assert torch.equal(preview.most_likely(drawn, tokens), tokens)


def test_the_table(drawn: preview.Drawn) -> None:
    gate = PreviewGate(brightness, fraction=0.25, threshold=None, acceptance=0.75, max_attempts=2)
    with torch.no_grad():
        rows = preview.measure(drawn, gate, ["repeat", "tile"])
    assert len(rows) == 2 * len(preview.FRACTIONS) + 1
    finished = rows[-1]
    assert finished["pearson"] == pytest.approx(1.0) and finished["best_of_two"] == pytest.approx(1.0)
    assert finished["groups"] == 2 and finished["drawings"] == 6 and finished["fraction"] == 1.0
    assert [("gain" in row) for row in rows] == [False, True] * len(preview.FRACTIONS) + [False]
    same = [row for row in rows if row["completion"] == "tile" and row["tokens"] <= 4]
    assert same and all(row["gain"] == 0.0 for row in same), "of one row there is nothing else to repeat"
    shown = preview.table(rows)
    assert "| 1 (16) | finished | 1.00 (1.00 to 1.00) |" in shown and "2 groups, 6 drawings." in shown
