"""Preview DGS in the sampler: the best try stays, the cap holds, what is dropped stops and is not trained on."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, LONG_CHAIN, Gate, make_prompt, sharp_policy

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout.completion import fill
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling, trajectory_key


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


def image_tokens(rollout: Rollout) -> list[int]:
    return next(segment for segment in rollout.segments if segment.kind == "image").tokens.tolist()


def test_preview_keeps_the_best_try_and_never_exceeds_the_cap(policy: JanusPolicy, tmp_path: Path) -> None:
    """With a threshold that nothing passes: the kept try is the best scored one, and its key and tokens are its own."""
    prompts = [make_prompt(f"draw {name}.", ("image",)) for name in ("it", "this", "a red creature at the city")]
    gate = Gate(threshold=0.99, max_attempts=3)
    sampling = Sampling(num_generations=1, cfg_weight=2.0)
    rollouts = generate(policy, prompts, sampling, gate)
    assert len(gate.seen) == 3 and gate.counts.tolist() == [0, 9]
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        scores = [tries[prompt.id, ""] for tries in gate.seen]
        assert rollout.attempts == 3
        best = 1 + scores.index(max(scores))
        assert rollout.uid == trajectory_key(sampling, prompt, 0, best)
        first_half = _draw_with_key(policy, prompt, sampling, best)[: policy.num_image_tokens // 2]
        assert rollout.segments[0].tokens[: policy.num_image_tokens // 2].tolist() == first_half


def _draw_with_key(policy: JanusPolicy, prompt: Prompt, sampling: Sampling, attempt: int) -> list[int]:
    """The image tokens that a single try with this attempt's key draws."""
    from syncr1.engine.rollout import batch as module

    original = module.trajectory_key
    module.trajectory_key = lambda s, p, m, a=1: original(s, p, m, attempt)
    try:
        return generate(policy, [prompt], sampling)[0].segments[0].tokens.tolist()
    finally:
        module.trajectory_key = original


def test_preview_accepts_at_once_above_the_threshold(policy: JanusPolicy) -> None:
    gate = Gate(threshold=0.01, max_attempts=5)
    prompt = make_prompt("draw it.", ("image",))
    rollouts = generate(policy, [prompt], Sampling(num_generations=4), gate)
    assert [r.attempts for r in rollouts] == [1] * 4 and gate.counts.tolist() == [4, 4]
    assert [image_tokens(r) for r in rollouts] == [
        image_tokens(r) for r in generate(policy, [prompt], Sampling(num_generations=4))
    ]


def test_what_cannot_be_judged_is_drawn_once(policy: JanusPolicy) -> None:
    """A NaN score (an anchor, a failed reward) neither costs tries nor counts against the acceptance rate."""
    gate = Gate(threshold=0.5, max_attempts=4, nan=True)
    rollouts = generate(policy, [make_prompt("draw it.", ("image",))], Sampling(num_generations=4), gate)
    assert [r.attempts for r in rollouts] == [1] * 4 and gate.counts.tolist() == [0, 0] and len(gate.seen) == 1


@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_preview_at_any_fraction(policy: JanusPolicy, fraction: float) -> None:
    """The first token at least; a preview of the whole picture is no preview."""
    gate = Gate(threshold=0.99, max_attempts=2, fraction=fraction)
    rollouts = generate(policy, [make_prompt("draw it.", CHAIN)], Sampling(num_generations=2, max_text_tokens=4), gate)
    assert all(
        len(s.tokens) == policy.num_image_tokens
        for s in (segment for r in rollouts for segment in r.segments if segment.kind == "image")
    )
    assert [r.attempts for r in rollouts] == ([1, 1] if fraction == 1.0 else [2, 2])


# Dropping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 2])
def test_dropped_members_stop_at_the_preview(policy: JanusPolicy, attempts: int) -> None:
    """All but the best two of each group, where nothing passes; the others' tokens are what they would have been."""
    prompts = [make_prompt("draw it.", CHAIN), make_prompt("draw this.", LONG_CHAIN, follow_up="what is it?")]
    sampling = Sampling(num_generations=5, cfg_weight=2.0, max_text_tokens=6)
    whole = generate(policy, prompts, sampling, Gate(threshold=0.99, max_attempts=attempts))
    gate = Gate(threshold=0.99, max_attempts=attempts, min_keep=2)
    engine = RolloutEngine(policy)
    rollouts = engine.generate(prompts, sampling, gate)
    N = policy.num_image_tokens
    for group in (rollouts[:5], rollouts[5:]):
        assert sum(rollout.dropped for rollout in group) == 3
        best = {r.uid: max(tries.get((r.prompt.id, r.text), -1) for tries in gate.seen) for r in group}
        assert min(best[r.uid] for r in group if not r.dropped) >= max(best[r.uid] for r in group if r.dropped)
    for rollout, full in zip(rollouts, whole, strict=True):
        expected = image_tokens(full)
        assert image_tokens(rollout) == (expected[: N // 2] if rollout.dropped else expected)
        assert (len(rollout.segments) == 2) == (rollout.dropped or rollout.prompt.segments == CHAIN)
        assert rollout.image is not None
        drawn = fill(torch.tensor([image_tokens(rollout)]), N) if rollout.dropped else torch.tensor([expected])
        torch.testing.assert_close(rollout.image, policy.draw(drawn)[0])
    tries = sum(rollout.attempts for rollout in rollouts)
    assert tries == 10 * attempts
    assert engine.stats.image_tokens == tries * N // 2 + 4 * N // 2
    assert engine.stats.image_tokens_saved == (tries - 4) * N // 2


def test_accepted_members_are_never_dropped(policy: JanusPolicy) -> None:
    prompt = make_prompt("draw it.", ("image",))
    scores = Gate(threshold=0.01, max_attempts=1)
    generate(policy, [prompt], Sampling(num_generations=6), scores)
    gate = Gate(threshold=0.01, max_attempts=1, min_keep=2)
    assert not any(r.dropped for r in generate(policy, [prompt], Sampling(num_generations=6), gate))


def test_what_cannot_be_judged_is_not_dropped(policy: JanusPolicy) -> None:
    gate = Gate(threshold=0.5, max_attempts=1, nan=True, min_keep=2)
    assert not any(
        r.dropped for r in generate(policy, [make_prompt("x", ("image",))], Sampling(num_generations=4), gate)
    )


def test_a_cap_of_one_survivor_is_refused() -> None:
    with pytest.raises(ValueError, match="min_keep must be at least 2"):
        Gate(threshold=0.5, max_attempts=1, min_keep=1)
