"""Masked drawing against the published loop, re-made on transformers' own forward: padded prompts, one mask over all.

Dims: B rows, L tokens of a padded sequence, N image tokens, V rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate, make_prompt
from small_show_o import TEXT_SLOTS, small_show_o
from torch import Tensor

from syncr1.engine.errors import DataError
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import Prompt, Rollout, Segment
from syncr1.engine.rollout.batch import IMAGE_OFFSET
from syncr1.engine.rollout.mask_schedule import MaskSchedule
from syncr1.engine.rollout.masked_draw import CONFIDENCE
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling, trajectory_key
from syncr1.kernels.api import cfg_sample
from syncr1.kernels.reference.philox import uniform

STEPS, GUIDANCE = 6, 1.75
SAMPLING = Sampling(
    num_generations=3, max_text_tokens=5, cfg_weight=1 + GUIDANCE, image_steps=STEPS, keep_proposals=True, seed=3
)


@pytest.fixture(scope="module")
def policy() -> ShowOPolicy:
    return ShowOPolicy(*small_show_o()).eval()


def published_schedule(num_tokens: int, num_steps: int) -> Iterator[int]:
    unknown = torch.tensor([[num_tokens]])
    for step in range(num_steps):
        mask_ratio = torch.cos(torch.tensor(1.0 * (step + 1) / num_steps) * math.pi * 0.5)
        mask_len = (num_tokens * mask_ratio).floor().unsqueeze(0)
        unknown = torch.max(torch.tensor([1]), torch.min(unknown - 1, mask_len)).long()
        yield int(unknown)


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 16, 256, 1024])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 12, 16, 18, 50])
def test_schedule_is_the_published_one_but_for_the_end(num_tokens: int, num_steps: int) -> None:
    schedule = MaskSchedule(num_tokens, num_steps)
    assert schedule.left[:-1] == tuple(published_schedule(num_tokens, num_steps))[:-1]
    assert schedule.left[-1] == 0
    temperature = 1.0
    for step, noise in enumerate(schedule.noise):
        temperature = temperature * (1.0 - 1.0 * (step + 1) / num_steps)
        assert noise == pytest.approx(temperature, abs=1e-12)


def padded(policy: ShowOPolicy, prompt: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """([L] ids, [L, L] True where seen): pads on the left, the image's span whole, text causal, pads never seen."""
    config = policy.model.config
    pads = torch.full((TEXT_SLOTS - prompt.numel(),), config.pad_token_id)
    codes = torch.where(image == policy.mask_token, config.mask_token_id, image + config.text_rows)
    soi, eoi = policy.image_frame()
    ids = torch.cat([pads, prompt, soi, codes, eoi])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[TEXT_SLOTS:] = True
    seen[:, : pads.numel()] = False
    seen[: pads.numel(), : pads.numel()] = torch.eye(pads.numel(), dtype=torch.bool)  # of rows that nobody reads
    return ids, seen


@torch.no_grad()
def published_logits(policy: ShowOPolicy, prompt: Tensor, image: Tensor) -> Tensor:
    """[N, K]: transformers' own forward with a mask, as the released code runs it."""
    ids, seen = padded(policy, prompt, image)
    model = policy.model.showo
    model.set_attn_implementation("eager")
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    out = model(input_ids=ids[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None], use_cache=False)
    model.set_attn_implementation("syncr1")
    first = policy.model.config.text_rows
    return out.logits[0, -(policy.num_image_tokens + 1) : -1, first : first + policy.num_codes]


def published_drawing(policy: ShowOPolicy, prompt: Tensor, key: int, sampling: Sampling) -> list[Tensor]:
    """What each step of `t2i_generate` samples, with our random numbers in place of its generator's."""
    N, guided = policy.num_image_tokens, sampling.cfg_weight != 1
    image, temperature = torch.full((N,), policy.mask_token), sampling.image_noise
    drawn = []
    for step in range(sampling.image_steps):
        conditional = published_logits(policy, prompt, image)
        free = published_logits(policy, policy.unconditional_tokens(), image)
        counter = IMAGE_OFFSET + step * N + torch.arange(N)
        keys = torch.full((N,), key)
        sample = cfg_sample(
            conditional, free if guided else None, cfg_weight=sampling.cfg_weight, seed=keys, offset=counter
        )
        unknown = image == policy.mask_token
        sampled = torch.where(unknown, sample.token, image)
        mixed = free + sampling.cfg_weight * (conditional - free) if guided else conditional
        chosen = mixed.softmax(-1).gather(1, sampled[:, None])[:, 0]
        chosen = torch.where(unknown, chosen, torch.finfo(chosen.dtype).max)
        ratio = 1.0 * (step + 1) / sampling.image_steps
        mask_len = int((N * torch.cos(torch.tensor(ratio) * math.pi * 0.5)).floor())
        mask_len = max(1, min(int(unknown.sum()) - 1, mask_len))
        temperature = temperature * (1.0 - ratio)
        confidence = chosen.double().log() - temperature * (-uniform(keys, counter, CONFIDENCE).log()).log()
        cut_off = confidence.sort().values[mask_len]
        drawn.append(sampled)
        image = torch.where(confidence < cut_off, policy.mask_token, sampled)
    return drawn


def image_of(rollout: Rollout) -> Segment:
    return rollout.segments[-1]


@pytest.mark.parametrize("guidance", [0.0, GUIDANCE])
def test_every_step_is_the_published_sampler_s(policy: ShowOPolicy, guidance: float) -> None:
    sampling = Sampling(
        num_generations=2, cfg_weight=1 + guidance, image_steps=STEPS, keep_proposals=True, seed=5, image_noise=1.3
    )
    prompts = [make_prompt("a red cat", ("image",)), make_prompt("two dogs", ("image",))]
    for rollout in generate(policy, prompts, sampling):
        expected = published_drawing(policy, rollout.prompt_tokens, rollout.uid, sampling)
        proposals = image_of(rollout).proposals
        assert proposals is not None
        assert torch.equal(proposals, torch.stack(expected))
        assert torch.equal(image_of(rollout).tokens, expected[-1])


def test_what_is_drawn_does_not_depend_on_the_batch(policy: ShowOPolicy) -> None:
    prompts = [make_prompt("a cat"), make_prompt("a dog", ("image",)), make_prompt("who?", ("text",))]
    together = generate(policy, prompts, SAMPLING)
    alone = [rollout for prompt in prompts for rollout in generate(policy, [prompt], SAMPLING)]
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one.segments, other.segments, strict=True))


def test_order_says_which_step_settled_a_token(policy: ShowOPolicy) -> None:
    schedule = MaskSchedule(policy.num_image_tokens, STEPS)
    (rollout, *_) = generate(policy, [make_prompt("a cat", ("image",))], SAMPLING)
    segment = image_of(rollout)
    assert segment.order is not None and segment.proposals is not None
    known = [int((segment.order <= step).sum()) for step in range(STEPS)]
    assert known == [policy.num_image_tokens - left for left in schedule.left]
    for step in range(STEPS):
        settled = segment.order == step
        assert torch.equal(segment.proposals[step][settled], segment.tokens[settled])


def test_an_image_sees_the_words_of_its_own_sequence_alone(policy: ShowOPolicy) -> None:
    """The turn says what the prompt and the text said; nothing else reaches the image."""
    (rollout,) = generate(policy, [make_prompt("a cat")], Sampling(num_generations=1, max_text_tokens=4, image_steps=3))
    turn = image_of(rollout).lead
    words = policy.decode_text(turn)
    assert words == f"a cat {rollout.text}".strip()
    drawn = published_drawing(policy, turn, rollout.uid, Sampling(cfg_weight=1.0, image_steps=3))
    assert torch.equal(drawn[-1], image_of(rollout).tokens)


def test_previews_show_proposals_and_go_on_from_the_state(policy: ShowOPolicy) -> None:
    """A try that is accepted goes on as if nobody had looked; the best of those that are not stays."""
    prompts = [make_prompt(words, ("image",)) for words in ("a cat", "a dog", "a red bird")]
    sampling = Sampling(num_generations=1, cfg_weight=2.0, image_steps=STEPS, keep_proposals=True)
    plain = generate(policy, prompts, sampling)
    accepted = generate(policy, prompts, sampling, Gate(threshold=0.01, max_attempts=3))
    for one, other in zip(plain, accepted, strict=True):
        assert torch.equal(image_of(one).tokens, image_of(other).tokens)
        assert image_of(one).order.equal(image_of(other).order)  # type: ignore[union-attr, arg-type]
        assert other.attempts == 1
    gate = Gate(threshold=0.99, max_attempts=3)
    again = generate(policy, prompts, sampling, gate)
    for prompt, rollout in zip(prompts, again, strict=True):
        scores = [tries[prompt.id, ""] for tries in gate.seen]
        best = 1 + scores.index(max(scores))
        assert rollout.attempts == 3
        assert rollout.uid == trajectory_key(sampling, prompt, 0, best)
        expected = published_drawing(policy, rollout.prompt_tokens, rollout.uid, sampling)
        assert torch.equal(image_of(rollout).proposals, torch.stack(expected))  # type: ignore[arg-type]


def test_what_a_preview_drops_is_shown_as_it_was_proposed(policy: ShowOPolicy) -> None:
    gate = Gate(threshold=0.99, max_attempts=1, min_keep=2)
    rollouts = generate(policy, [make_prompt("a cat", ("image",))], SAMPLING, gate)
    dropped = [rollout for rollout in rollouts if rollout.dropped]
    assert len(dropped) == 1
    for rollout in dropped:
        segment = image_of(rollout)
        assert segment.order is not None and bool((segment.order == -1).any())
        assert bool((segment.tokens < policy.num_codes).all()) and rollout.image is not None


def refused(prompt: Prompt, policy: ShowOPolicy) -> str:
    with pytest.raises(DataError) as caught:
        generate(policy, [prompt], SAMPLING)
    return str(caught.value)


def test_what_it_cannot_follow_is_refused_by_name(policy: ShowOPolicy) -> None:
    assert "expected none with ShowOPolicy" in refused(
        make_prompt("draw", ("image", "text"), follow_up="what is it?"), policy
    )
    long = refused(make_prompt("cat " * policy.max_positions), policy)
    assert f"positions for {policy.max_positions}" in long


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_steps": 0}, "image_steps must be an int ≥ 1, got 0"),
        ({"image_steps": 2.5}, "image_steps must be an int ≥ 1, got 2.5"),
        ({"image_noise": -1.0}, "image_noise must be a finite number ≥ 0, got -1.0"),
        ({"image_noise": math.inf}, "image_noise must be a finite number ≥ 0, got inf"),
    ],
)
def test_numbers_that_draw_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sampling(**wrong)
    assert said in str(caught.value), caught.value


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_draw_what_eager_steps_draw(dtype: torch.dtype) -> None:
    """In float32 there are none: plain attention cannot be captured, and is not tried."""
    policy = ShowOPolicy(*small_show_o()).eval().to("cuda", dtype)
    prompts = [make_prompt("a cat", ("image",)), make_prompt("a dog")]
    drawn = [RolloutEngine(policy, cuda_graphs=graphs).generate(prompts, SAMPLING) for graphs in (True, False)]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(image_of(one).tokens, image_of(other).tokens)
