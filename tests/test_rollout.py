"""What the sampler records is what the trainer computes; draws depend on seed, prompt, member and attempt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, PlainJanus, all_kinds_of_prompts, make_prompt, packed, sharp_policy, world_photo
from torch import Tensor

from syncr1.engine.dgs import PreviewGate
from syncr1.engine.learner import replay_error
from syncr1.engine.objective import Objective, PolicyForward
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, TEXT, PackedBatch, Prompt, Rollout, Segment
from syncr1.engine.rollout import Sampling, generate, trajectory_key

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


class Gate(PreviewGate):
    """A preview judged by the picture's mean red; remembers what was judged."""

    def __init__(self, *, threshold: float | None, max_attempts: int, fraction: float = 0.5, nan: bool = False) -> None:
        self.seen: list[dict[tuple[str, str], float]] = []
        super().__init__(self._judge, fraction=fraction, threshold=threshold, acceptance=0.5, max_attempts=max_attempts)
        self._nan = nan

    def _judge(self, prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        scores = images[:, 0].mean((1, 2))
        self.seen.append({(p.id, t): float(s) for p, t, s in zip(prompts, texts, scores, strict=True)})
        return torch.full_like(scores, float("nan")) if self._nan else scores


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
    assert int(batch.loss_mask.sum()) == sum(len(t) for t in tokens_of(rollouts))
    for code, segments in ((TEXT, texts), (IMAGE, images)):
        rows = batch.loss_mask & (batch.modality == code)
        assert largest_gap([trained[rows]], [torch.cat([s.logp for s in segments])]) <= REPLAY_TOLERANCE

    plain = PlainJanus(policy)
    for rollout in rollouts:
        replayed = plain.replay(rollout, temperature=temperature, cfg_weight=cfg_weight)
        for segment in rollout.segments:
            assert largest_gap([segment.logp], [replayed[segment.kind]]) <= REPLAY_TOLERANCE
            mixed = replayed["image_mixed" if segment.kind == "image" else "text"]
            assert largest_gap([segment.logp_mixed], [mixed]) <= REPLAY_TOLERANCE
    if cfg_weight != 1.0:  # the two distributions differ, or the comparison above would say little
        assert largest_gap([s.logp for s in images], [s.logp_mixed for s in images]) > 0.5


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
        by_kind = {segment.kind: segment for segment in rollout.segments}
        assert tuple(by_kind) == rollout.prompt.segments
        expected = (
            policy.tokenizer.decode(by_kind["text"].tokens, skip_special_tokens=True).strip()
            if "text" in by_kind
            else ""
        )
        assert rollout.text == expected
        if "image" not in by_kind:
            assert rollout.image is None
            continue
        assert rollout.image is not None and rollout.image.shape == (3, policy.image_size, policy.image_size)
        assert rollout.image.min() >= 0 and rollout.image.max() <= 1
        torch.testing.assert_close(rollout.image, policy.draw(by_kind["image"].tokens[None])[0], rtol=0, atol=1e-5)


def test_an_unknown_plan_is_refused(policy: JanusPolicy) -> None:
    with pytest.raises(ValueError, match=r"segments \('image', 'text'\), expected one of"):
        generate(policy, [make_prompt("x", ("image", "text"))], Sampling())


# Preview --------------------------------------------------------------------------------------------------------------


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
    import syncr1.engine.rollout as module

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
    assert tokens_of(rollouts) == tokens_of(generate(policy, [prompt], Sampling(num_generations=4)))


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
    assert all(len(s.tokens) == policy.num_image_tokens for s in segments_of(rollouts, "image"))
    assert [r.attempts for r in rollouts] == ([1, 1] if fraction == 1.0 else [2, 2])


def test_photos_change_what_is_said(policy: JanusPolicy, tmp_path: Path) -> None:
    """The photo's features reach the policy: greedy log-probabilities differ between photos."""
    ask = [replace(make_prompt("what is this?", ("text",), world_photo(tmp_path, i)), id="one") for i in (0, 77)]
    first, second = (generate(policy, [p], Sampling(num_generations=1, temperature=0))[0].segments[0] for p in ask)
    assert first.tokens.tolist() != second.tokens.tolist() or (first.logp - second.logp).abs().max() > 1e-3
