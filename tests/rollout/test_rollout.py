"""What the sampler records is what the trainer computes; draws depend on seed, prompt, member and attempt alone.

Previews have test_preview.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate, PlainJanus, all_kinds_of_prompts, make_prompt, packed, sharp_policy, world_photo
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, TEXT, PackedBatch, Prompt, Rollout, Segment, SegmentKind
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling

REPLAY_TOLERANCE = 1e-4
"""Nats, float32; about 5e-6 is measured."""


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    return all_kinds_of_prompts(tmp_path_factory.mktemp("photos"))


def segments_of(rollouts: Sequence[Rollout], kind: str) -> list[Segment]:
    return [segment for rollout in rollouts for segment in rollout.segments if segment.kind == kind]


def tokens_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [[int(t) for segment in rollout.segments for t in segment.tokens] for rollout in rollouts]


# The replay -----------------------------------------------------------------------------------------------------------


def trainer_logp(policy: JanusPolicy, batch: PackedBatch, temperature: float) -> Tensor:
    with torch.no_grad():
        return PolicyForward(policy, Objective(temperature=temperature))(batch)["logp"]


def largest_gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("cfg_weight", "temperature"), [(1.0, 1.0), (3.0, 0.8)])
def test_recorded_log_probabilities_are_the_trainers(
    policy: JanusPolicy, prompts: list[Prompt], cfg_weight: float, temperature: float, restarts: bool
) -> None:
    """The deepest invariant of the engine: cached, batched, padded, restarted sampling = the packed training forward,
    and both = plain transformers one sequence at a time, of the conditional and of the CFG-mixed distribution."""
    sampling = Sampling(num_generations=3, cfg_weight=cfg_weight, temperature=temperature, max_text_tokens=8)
    gate = Gate(threshold=None, max_attempts=3) if restarts else None
    rollouts = generate(policy, prompts, sampling, gate)
    texts, images = segments_of(rollouts, "text"), segments_of(rollouts, "image")
    assert len({len(segment.tokens) for segment in texts}) > 2, "texts should end at different lengths"
    if restarts:
        assert 0 < sum(r.attempts > 1 for r in rollouts) < len(images), "some restart, some do not"
    (batch,) = packed(policy, rollouts, 3)
    trained = trainer_logp(policy, batch, temperature)
    assert replay_error(batch, trained) <= REPLAY_TOLERANCE
    (copied,) = packed(policy, rollouts, 3, share_prefix=False)
    assert copied.num_tokens == batch.num_unshared_tokens > 1.3 * batch.num_tokens
    assert replay_error(copied, trainer_logp(policy, copied, temperature)) <= REPLAY_TOLERANCE
    assert int(batch.loss_mask.sum()) == sum(len(t) for t in tokens_of(rollouts))
    for code, segments in ((TEXT, texts), (IMAGE, images)):
        rows = batch.loss_mask & (batch.modality == code)
        assert largest_gap([trained[rows]], [torch.cat([s.logp for s in segments])]) <= REPLAY_TOLERANCE

    plain = PlainJanus(policy)
    for rollout in rollouts:
        replayed = plain.replay(rollout, temperature=temperature, cfg_weight=cfg_weight)
        for place, segment in enumerate(rollout.segments):
            name = "follow_up" if place and segment.kind == "text" else segment.kind
            assert largest_gap([segment.logp], [replayed[name]]) <= REPLAY_TOLERANCE
            mixed = replayed["image_mixed" if segment.kind == "image" else name]
            assert largest_gap([segment.logp_mixed], [mixed]) <= REPLAY_TOLERANCE
    if cfg_weight != 1.0:  # the two distributions differ, or the comparison above would say little
        assert largest_gap([s.logp for s in images], [s.logp_mixed for s in images]) > 0.5


@pytest.mark.parametrize("segments", [("text",), ("text", "image")])
def test_two_pictures_in_place_replay(policy: JanusPolicy, tmp_path: Path, segments: tuple[SegmentKind, ...]) -> None:
    """What is sampled is what is trained, and what transformers' model says of the same ids and pictures."""
    photos = (world_photo(tmp_path, 3), world_photo(tmp_path, 4))
    asked = [
        replace(make_prompt("is <image> or <image> red?", segments), images=shown, id=str(number))
        for number, shown in enumerate((photos, photos[::-1]))
    ]
    rollouts = generate(policy, asked, Sampling(num_generations=2, max_text_tokens=6, cfg_weight=1.0))
    (batch,) = packed(policy, rollouts, 2)
    assert replay_error(batch, trainer_logp(policy, batch, 1.0)) <= REPLAY_TOLERANCE
    plain = PlainJanus(policy)
    for rollout in rollouts:
        replayed = plain.replay(rollout)
        for segment in rollout.segments:
            assert largest_gap([segment.logp], [replayed[segment.kind]]) <= REPLAY_TOLERANCE
    turned = replace(rollouts[0], prompt=asked[1])
    (first, *_) = rollouts[0].segments
    assert largest_gap([first.logp], [plain.replay(turned)["text"]]) > 1e-3, "their order matters"


def test_one_position_off_is_seen(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    """The control: the released ULM-R1's fault (image tokens scored one position late) fails the replay by far."""
    rollouts = generate(policy, prompts, Sampling(num_generations=1, max_text_tokens=8))
    plain = PlainJanus(policy)
    gaps = []
    for rollout in rollouts:
        for segment in rollout.segments:
            if segment.kind == "image":
                gaps.append(largest_gap([segment.logp], [plain.replay(rollout, shift=1)["image"]]))
    assert min(gaps) > 0.5, "half a nat at least, thousands of tolerances"


def test_entropy_is_of_the_conditional_distribution(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    rollouts = generate(policy, prompts, Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=8))
    (batch,) = packed(policy, rollouts, 2)
    with torch.no_grad():
        entropy = PolicyForward(policy, Objective())(batch)["entropy"]
    recorded = torch.cat([segment.entropy for rollout in rollouts for segment in rollout.segments])
    torch.testing.assert_close(entropy[batch.loss_mask], recorded, rtol=0, atol=1e-4)


def test_greedy_images_are_those_of_a_loop_without_cache(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    """Protects guidance, positions and the hand-over: token for token what a naive loop draws, photos included."""
    plain, weight = PlainJanus(policy), 2.5
    chosen = [prompt for prompt in prompts if prompt.segments == ("image",)]
    rollouts = generate(policy, chosen, Sampling(num_generations=1, temperature=0.0, cfg_weight=weight))
    for prompt, rollout in zip(chosen, rollouts, strict=True):
        start = plain.text(torch.tensor([policy.image_start]))
        conditional = torch.cat([plain.prompt(prompt), start])
        free = plain.text(policy.unconditional_tokens())
        tokens: list[Tensor] = []
        with torch.no_grad():
            for _ in range(policy.num_image_tokens):
                c, u = (plain.image_logits(plain.hidden(x)[-1]) for x in (conditional, free))
                tokens.append((u + weight * (c - u)).argmax())
                drawn = plain.image(tokens[-1][None])
                conditional, free = torch.cat([conditional, drawn]), torch.cat([free, drawn])
        assert rollout.segments[0].tokens.tolist() == torch.stack(tokens).tolist()
        torch.testing.assert_close(rollout.image, policy.draw(torch.stack(tokens)[None])[0])


# Draws ----------------------------------------------------------------------------------------------------------------


def test_same_seed_same_draws_and_every_other_key_differs(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_generations=3, cfg_weight=2.0, max_text_tokens=8, seed=1, step=4)
    first, second = (generate(policy, prompts, sampling) for _ in range(2))
    assert tokens_of(first) == tokens_of(second) and [r.uid for r in first] == [r.uid for r in second]
    assert len({r.uid for r in first}) == len(first)
    for changed in (replace(sampling, seed=2), replace(sampling, step=5)):
        other = tokens_of(generate(policy, prompts, changed))
        assert sum(a == b for a, b in zip(tokens_of(first), other, strict=True)) <= 2, "only one-token texts may agree"
    for group in range(len(prompts)):
        if "image" in prompts[group].segments:
            members = tokens_of(first[3 * group : 3 * group + 3])
            assert len({tuple(m) for m in members}) == 3, "members of a group must differ"


@pytest.mark.parametrize("preview", [False, True])
def test_a_prompt_draws_the_same_alone_and_in_a_batch(
    policy: JanusPolicy, prompts: list[Prompt], preview: bool
) -> None:
    """Protects reproducibility over ranks and micro-batches: neighbours, padding and group size change nothing."""
    sampling = Sampling(num_generations=3, cfg_weight=2.0, max_text_tokens=8)
    gate = Gate(threshold=0.5, max_attempts=3) if preview else None
    together = generate(policy, prompts, sampling, gate)
    assert [r.prompt.id for r in together] == [p.id for p in prompts for _ in range(3)]
    assert [r.member for r in together] == [0, 1, 2] * len(prompts)
    for index, prompt in enumerate(prompts):
        gate = Gate(threshold=0.5, max_attempts=3) if preview else None
        alone = generate(policy, [prompt], replace(sampling, num_generations=2), gate)
        assert tokens_of(alone) == tokens_of(together[3 * index : 3 * index + 2])
        assert [r.uid for r in alone] == [r.uid for r in together[3 * index : 3 * index + 2]]


def test_texts_end_at_the_end_token_or_are_marked(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    for limit in (1, 3, 8):
        rollouts = generate(policy, prompts, Sampling(num_generations=6, max_text_tokens=limit))
        texts = segments_of(rollouts, "text")
        assert {segment.truncated for segment in texts} == {True, False}
        for segment in texts:
            ends = torch.isin(segment.tokens, torch.tensor(sorted(policy.end_tokens)))
            assert not ends[:-1].any() and bool(ends[-1]) is not segment.truncated
            assert len(segment.tokens) == limit if segment.truncated else len(segment.tokens) <= limit
        for segment in segments_of(rollouts, "image"):
            assert not segment.truncated and len(segment.tokens) == policy.num_image_tokens


def test_text_holds_no_forbidden_id(policy: JanusPolicy) -> None:
    """Even for a policy that wants nothing else; and the log-probabilities are those of what is left."""
    eager = sharp_policy()
    forbidden = [i for i in eager.tokenizer.all_special_ids if i not in eager.end_tokens]
    with torch.no_grad():
        eager.model.lm_head.weight[forbidden] = 5 * eager.model.lm_head.weight[next(iter(eager.end_tokens))]
    rollouts = generate(eager, [make_prompt("who?", ("text",))], Sampling(num_generations=16, max_text_tokens=8))
    texts = segments_of(rollouts, "text")
    assert not torch.isin(torch.cat([s.tokens for s in texts]), torch.tensor(forbidden)).any()
    assert all(segment.logp.isfinite().all() for segment in texts)
    (batch,) = packed(eager, rollouts, 16)
    assert replay_error(batch, trainer_logp(eager, batch, 1.0)) <= REPLAY_TOLERANCE


def test_decoded_text_and_pictures_are_those_of_the_tokens(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    for rollout in generate(policy, prompts, Sampling(num_generations=2, max_text_tokens=8)):
        by_kind = {segment.kind: segment for segment in reversed(rollout.segments)}
        assert tuple(segment.kind for segment in rollout.segments) == rollout.prompt.segments
        expected = (
            policy.tokenizer.decode(by_kind["text"].tokens, skip_special_tokens=True).strip()
            if rollout.prompt.segments[0] == "text"
            else ""
        )
        assert rollout.text == expected
        if "image" not in by_kind:
            assert rollout.image is None
            continue
        assert rollout.image is not None and rollout.image.shape == (3, policy.image_size, policy.image_size)
        assert rollout.image.min() >= 0 and rollout.image.max() <= 1
        torch.testing.assert_close(rollout.image, policy.draw(by_kind["image"].tokens[None])[0], rtol=0, atol=1e-5)


def test_follow_up_text_answers_about_the_drawn_image(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    """The turn behind the image shows the picture that this very member drew, through the vision tower."""
    chosen = [prompt for prompt in prompts if prompt.follow_up]
    assert len(chosen) == 2
    for rollout in generate(policy, chosen, Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=8)):
        *_, image, answer = rollout.segments
        assert (image.kind, answer.kind) == ("image", "text") and answer.lead_image is not None
        assert int(policy.image_slots(answer.lead).sum()) == len(answer.lead_image)
        assert rollout.image is not None
        torch.testing.assert_close(answer.lead_image, policy.see(rollout.image[None])[0], rtol=0, atol=1e-5)
        assert answer.lead.tolist() == policy.follow_up_tokens(rollout.prompt).tolist()
        assert rollout.follow_up_text == policy.decode_text(answer.tokens)
        assert bool(rollout.text) <= (rollout.prompt.segments[0] == "text")


def test_a_prompt_and_its_photo_run_once(policy: JanusPolicy, prompts: list[Prompt], monkeypatch: Any) -> None:
    """The point of the engine: G members cost one prefill, two prompts with one photo one encoding, the free prompt one
    prefill per batch; members hold only what they add."""
    seen, trunks = [], []
    see, trunk = policy.see, policy.trunk

    def counted(embeddings: Tensor, positions: Tensor, layout: Any) -> Tensor:
        trunks.append((type(layout).__name__, positions.numel()))
        return trunk(embeddings, positions, layout)

    monkeypatch.setattr(policy, "see", lambda images: seen.append(len(images)) or see(images))
    monkeypatch.setattr(policy, "trunk", counted)
    chosen = [prompt for prompt in prompts if not prompt.follow_up]
    engine = RolloutEngine(policy)
    engine.generate(chosen, Sampling(num_generations=5, cfg_weight=2.0, max_text_tokens=8))
    assert seen == [len({image for prompt in chosen for image in prompt.images})]
    lengths = [policy.prompt_tokens(prompt).numel() for prompt in chosen]
    free, N = policy.unconditional_tokens().numel(), policy.num_image_tokens
    assert [size for name, size in trunks if name == "Prefill"] == [sum(lengths) + free]
    assert engine.stats.prefill_tokens == sum(lengths) + free
    # 5 members of: 2 texts of 8, 2 images, 2 chains; every image with its start, and its unconditional twin.
    own = 5 * (2 * 8 + 2 * (1 + N) + 2 * (8 + 1 + N) + 4 * N)
    assert engine.stats.kv_bytes == policy.cache_shape().num_bytes(sum(lengths) + free + own)


def test_texts_that_ended_free_their_rows(policy: JanusPolicy, prompts: list[Prompt], monkeypatch: Any) -> None:
    """The forward of a step has the rows of texts under way and no others."""
    rows, trunk = [], policy.trunk
    monkeypatch.setattr(
        policy, "trunk", lambda e, p, layout: (rows.append(len(e)) if e.shape[1] == 1 else None) or trunk(e, p, layout)
    )
    chosen = [prompt for prompt in prompts if prompt.segments == ("text",)]
    rollouts = generate(policy, chosen, Sampling(num_generations=8, max_text_tokens=8))
    lengths = torch.tensor([len(rollout.segments[0].tokens) for rollout in rollouts])
    assert len(lengths.unique()) > 2
    assert rows == [n for step in range(1, 8) if (n := int((lengths >= step).sum()))]


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        (("image", "image"), "expected one of"),
        (("text", "text"), "expected one of"),
        ((), "expected one of"),
        (("image", "text"), "expected a follow_up question"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy: JanusPolicy, segments: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        generate(policy, [make_prompt("x", segments)], Sampling())


def test_no_prompts_no_rollouts(policy: JanusPolicy) -> None:
    assert generate(policy, [], Sampling()) == []


def test_one_generation_is_a_group_of_one(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    """Evaluation draws so; packing then has nothing to share, and the replay holds."""
    rollouts = generate(policy, prompts, Sampling(num_generations=1, max_text_tokens=8))
    (batch,) = packed(policy, rollouts, 1)
    assert batch.prefix_tokens.numel() == 0 and batch.num_tokens == batch.num_unshared_tokens
    assert replay_error(batch, trainer_logp(policy, batch, 1.0)) <= REPLAY_TOLERANCE


def test_photos_change_what_is_said(policy: JanusPolicy, tmp_path: Path) -> None:
    """The photo's features reach the policy: greedy log-probabilities differ between photos."""
    ask = [replace(make_prompt("what is this?", ("text",), world_photo(tmp_path, i)), id="one") for i in (0, 77)]
    first, second = (generate(policy, [p], Sampling(num_generations=1, temperature=0))[0].segments[0] for p in ask)
    assert first.tokens.tolist() != second.tokens.tolist() or (first.logp - second.logp).abs().max() > 1e-3


def test_rollouts_of_an_evaluation_in_inference_mode_train(policy: JanusPolicy, prompts: list[Prompt]) -> None:
    """The same draws as outside; what they are made of, and what the engine keeps, serves a training step."""
    sampling = Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=8)
    engine = RolloutEngine(policy, cuda_graphs=False)
    with torch.inference_mode():
        evaluated = engine.generate(prompts[:3], sampling)
    rollouts = engine.generate(prompts[:3], sampling)
    assert tokens_of(evaluated) == tokens_of(rollouts)
    assert not any(segment.tokens.is_inference() for rollout in evaluated for segment in rollout.segments)
    forward = PolicyForward(copy.deepcopy(policy).train(), Objective(temperature=1.0))
    losses = [forward(packed(policy, drawn, 2)[0], num_items=100.0)["loss"] for drawn in (evaluated, rollouts)]
    for loss in losses:
        loss.backward()
    assert losses[0].equal(losses[1])
