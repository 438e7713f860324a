"""What does not fit is refused before anything is allocated, with the number to lower."""

from __future__ import annotations

import re

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, LONG_CHAIN, Gate, make_prompt, sharp_policy

from syncr1.engine.errors import DataError, RolloutTooLarge
from syncr1.engine.policies.cache import CacheShape
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.rollout import sampler as rollout_module
from syncr1.engine.rollout.capacity import Sizes, check_fits, check_lengths, free_bytes
from syncr1.engine.rollout.drawing_turn import SEAM, DrawingTurns
from syncr1.engine.rollout.preview import preview_length
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling

SHAPE = CacheShape(num_layers=24, num_heads=16, head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


def test_bytes_of_janus_pro_by_hand() -> None:
    assert SHAPE.num_bytes(1) == 2 * 24 * 2048 * 2 == 192 * 1024


def test_sizes_by_hand(policy: JanusPolicy) -> None:
    N = policy.num_image_tokens
    prompts = [
        make_prompt("a", ("text",)),
        make_prompt("b", ("image",)),
        make_prompt("c", CHAIN),
        make_prompt("d", LONG_CHAIN, follow_up="?"),
    ]
    follow_ups = [None, None, None, torch.zeros(9)]
    sizes = Sizes.of(policy, prompts, follow_ups, DrawingTurns(policy, "none", 5))
    assert sizes.own == [5, 1 + N, 6 + N, 6 + N + 9 + 5]
    assert sizes.before_image == [5, 1, 6, 6] and sizes.images == [False, True, True, True]
    assert sizes.preview_columns(3, 4, guided=False) == 3 * (5 + 10 + 10)
    assert sizes.preview_columns(3, 4, guided=True) == 3 * (9 + 14 + 14)
    assert sizes.preview_columns(3, 4, guided=True, reach=9) == 3 * (9 + 14 + 14) + 2 * 3 * 3 * 5
    assert sizes.preview_columns(3, 0, guided=True) == 0
    turns = DrawingTurns(policy, "again: {text}", 5)
    around = policy.drawing_tokens(prompts[2], "again:").numel()
    turn = 1 + around + SEAM + 5  # the answer's end comes first
    sizes = Sizes.of(policy, prompts, follow_ups, turns)
    assert sizes.before_image == [5, 1, 5 + turn, 5 + turn]
    assert sizes.own == [5, 1 + N, 5 + turn + N, 5 + turn + N + 9 + 5]


def test_a_batch_that_does_not_fit_says_what_to_lower() -> None:
    """7B at 128 samples: the memory is named before it is asked for."""
    check_fits(SHAPE, 100, 100, 8, 200 * 192 * 1024)
    with pytest.raises(RolloutTooLarge) as error:
        check_fits(SHAPE, 1000, 100_000, 8, 10 * 2**30)
    told = str(error.value)
    assert "at most 10.00 GiB, which may be used, got 18.49 GiB (1000 prompt tokens, 100000 tokens of" in told
    for name in ("prompts_per_step", "num_generations (8)", "max_completion_length"):
        assert name in told


def test_nothing_is_allocated_before_the_check(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RolloutEngine(policy, max_bytes=1000)
    monkeypatch.setattr(engine.stepper, "store", lambda *_: pytest.fail("allocated"))
    with pytest.raises(RolloutTooLarge):
        engine.generate([make_prompt("draw it.")], Sampling())


def test_the_estimate_is_what_is_held(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly enough memory for the batch, its guidance and every preview tried again: it runs; one byte less: not."""
    prompts = [make_prompt("draw it.", ("image",)), make_prompt("who?", ("text",))]
    sampling = Sampling(num_generations=3, cfg_weight=2.0, max_text_tokens=4)
    held: dict[str, int] = {}
    make = rollout_module.Stepper.store

    def store(self, name, shape, lengths):  # type: ignore[no-untyped-def]
        held[name] = max(held.get(name, 0), shape.num_bytes(sum(lengths)))
        return make(self, name, shape, lengths)

    monkeypatch.setattr(rollout_module.Stepper, "store", store)
    RolloutEngine(policy).generate(prompts, sampling, Gate(threshold=0.99, max_attempts=2))
    assert set(held) == {"prompts", "own", "tries"}
    most = sum(held.values())
    RolloutEngine(policy, max_bytes=most).generate(prompts, sampling, Gate(threshold=0.99, max_attempts=2))
    with pytest.raises(RolloutTooLarge):
        RolloutEngine(policy, max_bytes=most - 1).generate(prompts, sampling, Gate(threshold=0.99, max_attempts=2))


def test_a_prompt_beyond_the_positions_is_refused(policy: JanusPolicy) -> None:
    room = policy.max_positions - policy.num_image_tokens - 1 - 4
    fits = "a " * (room // 2)
    while policy.prompt_tokens(make_prompt(fits)).numel() > room:
        fits = fits[: -len("a ") * 4]
    generate(policy, [make_prompt(fits)], Sampling(num_generations=1, max_text_tokens=4))
    wanted = re.escape(f"positions for {policy.max_positions}; shorten the prompt or lower max_completion_length")
    with pytest.raises(ValueError, match=wanted):
        generate(policy, [make_prompt("a " * policy.max_positions)], Sampling(num_generations=1))


def test_a_training_is_refused_for_its_longest_prompt(policy: JanusPolicy) -> None:
    """Of thousands, by what a few of most bytes have in tokens; in the drawing turn the request, too, is long."""
    short = [make_prompt(f"draw {i}", CHAIN) for i in range(60)]
    long = make_prompt("who?", CHAIN, request="draw " + "z " * policy.max_positions)
    for most in (None, 2):
        check_lengths(policy, short, "t2i_r1", 5, most=most)
        check_lengths(policy, [*short, long], "none", 5, most=most)
        with pytest.raises(DataError, match=r"prompt .*who.* of them in its drawing turn, .* shorten the drawing turn"):
            check_lengths(policy, [*short, long, *short], "t2i_r1", 5, most=most)


def test_an_empty_prompt_is_refused(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "prompt_tokens", lambda prompt: torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="is empty: expected at least one token"):
        generate(policy, [make_prompt("")], Sampling())


def test_preview_length() -> None:
    gate = Gate(threshold=0.5, max_attempts=1)
    for fraction, tokens, length in [(0.5, 16, 8), (0.01, 16, 1), (1.0, 16, 0), (0.99, 16, 0), (0.25, 576, 144)]:
        gate.fraction = fraction
        assert preview_length(gate, tokens) == length
    assert preview_length(None, 16) == 0


def test_free_memory_is_read() -> None:
    assert 2**26 < free_bytes(torch.device("cpu")) < 2**50
