"""top_k, top_p and min_p in rollouts: what was kept is recorded, packed, and trained over, for every kind of policy.

The kept sets themselves are held against the reference in tests/kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models
import torch
from helpers import Gate, all_kinds_of_prompts, given, make_prompt, packed, sharp_policy, world_photo
from small_emu3 import all_plans, sharp_emu3
from stepping_cases import same_draws, sampling_of, static_engines

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import IMAGE, TEXT, PackedBatch, Prompt, Rollout, Segment
from syncr1.engine.rollout.decode import Samples
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import EVERYTHING, Sampling, Truncation
from syncr1.kernels.support import holds, num_words, unpack

REPLAY_TOLERANCE = 1e-4
"""Nats, float32; about 1e-5 is measured, and whole nats without the kept sets."""
WAYS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "mixed": {"top_k": 20, "min_p": 0.02, "image_top_k": 0, "image_top_p": 0.6},
}


def janus(folder: Path) -> tuple[Callable[[], Policy], list[Prompt]]:
    return sharp_policy, all_kinds_of_prompts(folder)[3:7:3]


def emu3(folder: Path) -> tuple[Callable[[], Policy], list[Prompt]]:
    return sharp_emu3, all_plans(world_photo(folder, 3))[-2:]


def text_only(folder: Path) -> tuple[Callable[[], Policy], list[Prompt]]:
    return text_models.policy, [make_prompt(text, ("text",)) for text in ("what is it?", "who?", "where is the cup?")]


POLICIES = {"janus": janus, "emu3": emu3, "text": text_only}


@pytest.fixture(scope="module", params=POLICIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return POLICIES[request.param](tmp_path_factory.mktemp("photos"))


def segments_of(rollouts: Sequence[Rollout], kind: str) -> list[Segment]:
    return [segment for rollout in rollouts for segment in rollout.segments if segment.kind == kind]


def logp_of(policy: Policy, batch: PackedBatch, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return PolicyForward(policy, Objective(temperature=temperature))(batch)["logp"]


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_scores_what_was_sampled(made: Any, way: str) -> None:
    """Texts, guided images, follow-ups and second tries at a temperature, packed with shared prefixes and without."""
    make, prompts = made
    policy, drawn = make(), {"cfg_weight": 3.0} if make().num_image_tokens else {}
    sampling = Sampling(num_generations=3, temperature=0.8, max_text_tokens=8, **drawn, **WAYS[way])
    gate = Gate(threshold=None, max_attempts=3) if drawn else None
    rollouts = generate(policy, prompts, sampling, gate)
    assert not drawn or any(rollout.attempts > 1 for rollout in rollouts)
    for kind, shared in (("text", True), ("image", False)):
        segments = segments_of(rollouts, kind)
        acts = sampling.truncation(kind).acts  # type: ignore[arg-type]
        assert all((segment.support is not None) == acts for segment in segments)
        if segments and acts:
            check_sets(policy, segments, sampling.truncation(kind))  # type: ignore[arg-type]
        (batch,) = packed(policy, rollouts, 3, share_prefix=shared)
        trainer = make().train()
        assert replay_error(batch, logp_of(trainer, batch, 0.8)) <= REPLAY_TOLERANCE
        everything = replace(batch, support=(None, None))
        assert replay_error(everything, logp_of(trainer, everything, 0.8)) > 0.05


def check_sets(policy: Policy, segments: Sequence[Segment], truncation: Truncation) -> None:
    """Every sampled token is in its set, which top_k bounds, and what is certain has log-probability 0."""
    forced = policy.forced_image_tokens() if segments[0].kind == "image" else None
    support = torch.cat([segment.support for segment in segments])  # type: ignore[misc]
    tokens, logp = (torch.cat([getattr(segment, name) for segment in segments]) for name in ("tokens", "logp"))
    if forced is not None:
        free = torch.cat([forced[: segment.tokens.numel()] < 0 for segment in segments])
        support, tokens, logp = support[free], tokens[free], logp[free]
    sizes = unpack(support, 32 * support.shape[1]).sum(1)
    assert bool(holds(support, tokens).all()) and int(sizes.min()) >= 1 and len(sizes.unique()) > 1 - truncation.top_k
    assert not truncation.top_k or int(sizes.max()) <= truncation.top_k
    assert not bool(logp[sizes == 1].any()) and bool((logp[sizes > 1] < 0).all())


@pytest.mark.parametrize("way", ["top-k", "mixed"])
def test_on_policy_the_ratio_is_one_in_every_row(made: Any, way: str) -> None:
    """And without the kept sets in the loss, against log-probabilities over them, it is not."""
    make, prompts = made
    guidance = 2.0 if make().num_image_tokens else 1.0
    rollouts = generate(
        make(), prompts, Sampling(num_generations=2, cfg_weight=guidance, max_text_tokens=6, **WAYS[way])
    )
    (batch,) = packed(make(), rollouts, 2)
    forward = PolicyForward(make(), Objective(beta=0.01))
    logp = logp_of(forward.policy, batch, 1.0)
    items = {"text": 10.0, "image": 10.0}
    out = forward(replace(batch, old_logp=logp, ref_logp=logp), items)
    ratios = [float(out[f"metric/{end}/{name}"]) for end in ("ratio_min", "ratio_max") for name in ("text", "image")]
    assert ratios == [1.0] * 4
    out["loss"].backward()
    bare = forward(replace(batch, old_logp=logp, ref_logp=logp, support=(None, None)), items)
    assert float(bare["metric/ratio_min/text"]) < 0.9


def test_the_reference_is_renormalised_over_the_same_sets(tmp_path: Path) -> None:
    """Another model's log-probabilities of the sampled tokens are those given that one of the kept ids comes."""
    policy, other = sharp_policy(), sharp_policy(seed=1)
    rollouts = generate(
        policy, all_kinds_of_prompts(tmp_path)[:4], Sampling(num_generations=2, top_k=5, cfg_weight=2.0)
    )
    (batch,) = packed(policy, rollouts, 2)
    given_set, free = (logp_of(other, b, 1.0) for b in (batch, replace(batch, support=(None, None))))
    mask = batch.loss_mask
    assert bool((given_set >= free - 1e-5)[mask].all()) and float((given_set - free)[mask].max()) > 1
    with torch.no_grad():
        streams = PolicyForward(other, Objective())._streams(batch)
    for stream, modality in zip(streams, (TEXT, IMAGE), strict=True):
        logits = stream.hidden @ stream.weight.t() + (0 if stream.bias is None else stream.bias)
        assert stream.support is not None
        kept = unpack(stream.support, logits.shape[1])
        expected = (
            logits.double().masked_fill(~kept, -torch.inf).log_softmax(-1).gather(1, stream.targets[:, None])[:, 0]
        )
        found = given_set[mask & (batch.modality == modality)]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_sets_follow_what_is_pruned_dropped_and_moved(tmp_path: Path) -> None:
    """Rows are those of the loss tokens in the order of the axis, whatever is left out and wherever it is cut."""
    policy = sharp_policy()
    prompts = all_kinds_of_prompts(tmp_path)[:4]
    sampling = Sampling(num_generations=3, top_k=4, cfg_weight=2.0, max_text_tokens=8)
    rollouts = generate(policy, prompts, sampling, Gate(threshold=2.0, max_attempts=2, min_keep=2))
    assert any(rollout.dropped for rollout in rollouts)
    keep = torch.tensor([True, False, True] * 4)
    for most in (1 << 30, 60):
        batches = packed(policy, rollouts, 3, most, keep=keep)
        for batch in batches:
            moved = batch.to(torch.device("cpu"))
            for modality in (TEXT, IMAGE):
                tokens = batch.tokens[batch.loss_mask & (batch.modality == modality)]
                support = moved.support[modality]
                assert (support is None) == (tokens.numel() == 0)
                assert support is None or bool(holds(support, tokens).all())
            assert replay_error(batch, logp_of(policy, batch, 1.0)) <= REPLAY_TOLERANCE
    (empty,) = packed(policy, rollouts, 3, keep=torch.zeros(12, dtype=torch.bool))
    for idle in (empty, batches[0].without_loss()):
        assert idle.support == (None, None) and not bool(logp_of(policy, idle, 1.0).any())
    free = [replace(r, segments=tuple(replace(s, support=None) for s in r.segments)) for r in rollouts[:3]]
    mixed_batch = packed(policy, free + rollouts[3:], 3)[0]
    texts = mixed_batch.support[TEXT]
    assert (
        texts is not None and bool((texts[: int((texts == -1).all(1).sum())] == -1).all()) and bool((texts != -1).any())
    )


def test_graphs_draw_and_record_what_eager_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place where the capture wrote; a change of truncation makes a table of its own."""
    policy = sharp_policy()
    prompts, engine = all_kinds_of_prompts(tmp_path)[2:4], static_engines(policy, monkeypatch)()
    for step, way in enumerate(("top-k", "mixed")):
        sampling = replace(sampling_of(step), **WAYS[way])
        gates = [Gate(threshold=0.5, max_attempts=2, min_keep=2) for _ in range(2)]
        expected = RolloutEngine(policy, cuda_graphs=False).generate(prompts, sampling, gates[0])
        found = engine.generate(prompts, sampling, gates[1])
        same_draws(found, expected)
        for one, other in zip(found, expected, strict=True):
            for mine, theirs in zip(one.segments, other.segments, strict=True):
                assert mine.support is not None and theirs.support is not None and mine.support.equal(theirs.support)
    plain = engine.generate(prompts, sampling_of(9))
    assert all(segment.support is None for rollout in plain for segment in rollout.segments)
    assert all(table.support.numel() == 0 for name, table in engine.stepper._samples.items() if name != "tries")


def test_settings_of_a_modality() -> None:
    both = Sampling(top_k=5, top_p=0.9, image_top_p=1.0, image_min_p=0.2)
    assert both.truncation("text") == Truncation(top_k=5, top_p=0.9)
    assert both.truncation("image") == Truncation(top_k=5, top_p=1.0, min_p=0.2)
    assert Sampling(top_k=5, image_top_k=0).truncation("image") == EVERYTHING
    assert replace(both, temperature=0.0).truncation("text") == EVERYTHING  # greedy leaves nothing out
    apart = replace(both, temperature=0.0, image_temperature=1.0)
    assert apart.truncation("text") == EVERYTHING and apart.truncation("image") == both.truncation("image")
    assert not Sampling().truncation("image").acts
    assert Samples(3, 4, torch.device("cpu")).support.numel() == 0
    assert Samples(3, 4, torch.device("cpu"), num_words(100)).support.shape == (4, 4, 4)
    assert given("text", [1, 2]).support is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.5), ("top_p", None), ("min_p", -0.1), ("min_p", 2)],
)
def test_what_no_truncation_can_be_is_told_at_once(name: str, value: Any) -> None:
    for given_name in (name, f"image_{name}") if value is not None else (name,):
        with pytest.raises(ValueError, match=rf"^generate: {given_name} must be .*, got {value}; .+"):
            Sampling(**{given_name: value})
