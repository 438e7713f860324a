"""DeepSpeed changes no result: every ZeRO stage, on one process or two, learns the same from the same batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
from helpers import (
    ROOT,
    all_kinds_of_prompts,
    everything_partitioned,
    learn,
    own_process_group,
    packed,
    sampled,
    sharp_policy,
    weights_of,
)
from torch import Tensor

from syncr1.engine.forward.objective import Objective
from syncr1.engine.learn.learner import Learner, replay_error
from syncr1.engine.learn.optimizer import LearnerSettings, deepspeed_config
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import PackedBatch, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
GROUP = 3
ONE_RANK, TWO_RANKS = 5e-5, 1e-4
"""Tolerances of weights after two AdamW steps, which move each by up to 2e-3."""


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group(), everything_partitioned():
        yield


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def rollouts(policy: JanusPolicy, folder: Path) -> list[Rollout]:
    return sampled(policy, folder, num_generations=GROUP)


@pytest.fixture(scope="module")
def batches(policy: JanusPolicy, rollouts: list[Rollout]) -> list[PackedBatch]:
    """A micro-batch per group."""
    return packed(policy, rollouts, GROUP, 1)


def make_learner(
    stage: int = 0,
    *,
    learning_rate: float = 1e-3,
    num_iterations: int = 1,
    bf16: bool = False,
    max_grad_norm: float = 1.0,
    **objective: Any,
) -> Learner:
    settings = LearnerSettings(
        learning_rate=learning_rate,
        zero_stage=stage,
        num_iterations=num_iterations,
        bf16=bf16,
        max_grad_norm=max_grad_norm,
    )
    return Learner(sharp_policy(), Objective(**objective), settings)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float) -> None:
    """At most `atol` apart (Adam makes much of the rounding of a gradient near 0), and a hundredth of it on average."""
    assert set(got) == set(want)
    assert sum(float((got[n] - w).abs().sum()) for n, w in want.items()) <= 0.01 * atol * sum(
        w.numel() for w in want.values()
    )
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# One process ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand(batches: list[PackedBatch], rollouts: list[Rollout]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two updates with torch alone: losses, norms before clipping, weights."""
    from syncr1.engine.forward.objective import PolicyForward

    policy = sharp_policy().train()
    forward = PolicyForward(policy, Objective())
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    masks = [(b.loss_mask & (b.modality == code)).sum() for code in (0, 1) for b in packed(policy, rollouts, GROUP)]
    losses, norms = [], []
    for _ in range(2):
        optimizer.zero_grad()
        items = {"text": float(masks[0]), "image": float(masks[1])}
        out = [forward(batch, num_items=items)["loss"] for batch in batches]
        torch.stack(out).sum().backward()
        losses.append(float(torch.stack(out).detach().sum()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    return {"losses": losses, "norms": norms}, weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_equals_plain_torch(
    stage: int, batches: list[PackedBatch], by_hand: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    """Loss, gradient norm before clipping and weights after two AdamW steps over six micro-batches."""
    expected, weights = by_hand
    got, learner = learn(stage, batches)
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert expected["norms"][0] > 1.0, "clipping takes part"
    assert_close(weights_of(learner), weights, ONE_RANK)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_gradient_clipping_without_zero(batches: list[PackedBatch], limit: float) -> None:
    """0 switches it off; the norm is reported either way (DeepSpeed reports none without ZeRO)."""
    learner = make_learner(0, max_grad_norm=limit, learning_rate=0.0)
    used: list[float] = []
    trained = [p for p in learner.engine.module.parameters() if p.requires_grad]

    def record(*_: Any) -> None:
        used.append(float(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()))

    learner.optimizer.register_step_pre_hook(record)
    norm = learner.update(learner.score(batches))["grad_norm"]
    assert norm > 1.0 and used[-1] == pytest.approx(limit or norm, rel=1e-4)


def test_scored_log_probabilities_are_the_samplers(batches: list[PackedBatch]) -> None:
    """`old_logp` and, at step 0, `ref_logp` are what the sampler recorded, to 1e-4 nats; else they are absent."""
    scored = make_learner(num_iterations=2, beta=0.1).score(batches)
    for batch in scored:
        assert batch.old_logp is not None and batch.ref_logp is not None
        assert replay_error(batch, batch.old_logp) <= 1e-4 and replay_error(batch, batch.ref_logp) <= 1e-4
        assert not batch.old_logp.requires_grad
    plain = make_learner().score(batches)
    assert all(batch.old_logp is None and batch.ref_logp is None for batch in plain)


def test_replay_error_is_reported_and_has_power(batches: list[PackedBatch]) -> None:
    learner = make_learner(learning_rate=1e-3)
    first = learner.update(learner.score(batches))["rollout/replay_logp_max_abs"]
    second = learner.update(learner.score(batches))["rollout/replay_logp_max_abs"]
    assert first <= 1e-4 and second > 0.01, "after an update the sampler's numbers are stale"
    # What the loss has no use for says 0 and is left out; what it looked at and found certain counts.
    batch = replace(batches[0], advantages=torch.tensor([[1.0, 1.0], *[[0.0, 0.0]] * (GROUP - 1)]))
    length, own = int(batch.cu_seqlens[1]), batch.sampled_logp * batch.loss_mask
    silent = torch.cat([own[:length], torch.zeros_like(own[length:])])
    assert replay_error(batch, silent) == 0.0
    worst = int(own[:length].argmin())
    assert replay_error(batch, silent.index_fill(0, torch.tensor([worst]), 0.0)) == pytest.approx(-float(own[worst]))


@pytest.mark.parametrize("stage", [0, 3])
def test_several_iterations_clip(stage: int, batches: list[PackedBatch]) -> None:
    """mu = 2: the first update sees ratio 1, the second one leaves the clip range; weights are those of two steps."""
    learner = make_learner(stage, num_iterations=2, learning_rate=5e-3)
    metrics = learner.update(learner.score(batches))
    assert metrics["clip_low/image"] + metrics["clip_high/image"] > 0.01 and metrics["ratio_max/image"] > 1.2
    assert metrics["rollout/replay_logp_max_abs"] <= 1e-4, "of the weights that sampled, not of the second update's"
    once = make_learner(stage, learning_rate=5e-3)
    assert once.update(once.score(batches))["ratio_max/image"] == pytest.approx(1.0, abs=1e-3)


def test_adamws_numbers_reach_the_optimizer(batches: list[PackedBatch]) -> None:
    """transformers' names, below DeepSpeed's own wrapper as well; a large epsilon lets one update move weights less."""
    settings = LearnerSettings(learning_rate=1e-3, adam_beta1=0.8, adam_beta2=0.999, adam_epsilon=1e-3)
    learner, plain = Learner(sharp_policy(), Objective(), settings), make_learner()
    wrapped = Learner(sharp_policy(), Objective(), replace(settings, zero_stage=2))
    for one, numbers in (
        (learner, ((0.8, 0.999), 1e-3)),
        (wrapped, ((0.8, 0.999), 1e-3)),
        (plain, ((0.9, 0.98), 1e-8)),
    ):
        (group,) = one.engine.optimizer.param_groups
        assert (group["betas"], group["eps"]) == numbers
    moved = []
    for one in (learner, plain):
        before = {name: p.detach().clone() for name, p in one.policy.named_parameters()}
        one.update(one.score(batches))
        moved.append(sum(float((p - before[n]).abs().sum()) for n, p in one.policy.named_parameters()))
    assert 0 < moved[0] < 0.5 * moved[1]


def test_text_and_image_may_differ(policy: JanusPolicy, folder: Path) -> None:
    """Drawn at temperatures of their own, trained at the same; clip range and KL weight likewise, and None is the plain
    one."""
    own = {"temperature": 1.2, "image_temperature": 0.6}
    sampling = Sampling(num_generations=GROUP, max_text_tokens=8, cfg_weight=2.0, **own)
    prompts = all_kinds_of_prompts(folder)[:6]
    batches = packed(policy, generate(policy, prompts, sampling), GROUP)
    for objective, fits in ((own, True), ({"temperature": 1.2}, False), ({"temperature": 0.6}, False)):
        (scored,) = make_learner(num_iterations=2, **objective).score(batches)
        assert scored.old_logp is not None and (replay_error(scored, scored.old_logp) <= 1e-4) is fits, objective
    tight = make_learner(num_iterations=2, learning_rate=2e-4, epsilon=0.9, image_epsilon=1e-3, image_beta=0.1, **own)
    metrics = tight.update(tight.score(batches))
    assert metrics["clip_low/image"] + metrics["clip_high/image"] > 0.2 and metrics["clip_low/text"] < 0.05
    kl = make_learner(beta=0.3, image_beta=0.0, learning_rate=0.0, **own)
    (scored,) = kl.score(batches)
    assert scored.ref_logp is not None
    far = [
        replace(scored, ref_logp=scored.ref_logp - shift * (scored.modality == code))
        for code, shift in ((1, 2.0), (0, 2.0))
    ]
    norms = [kl.update([batch])["grad_norm"] for batch in (scored, *far)]
    assert norms[1] == norms[0] != pytest.approx(norms[2], rel=1e-3)


def test_the_reference_stays_and_kl_grows(batches: list[PackedBatch]) -> None:
    learner = make_learner(beta=0.1, learning_rate=2e-3)
    kls = []
    for _ in range(3):
        metrics = learner.update(learner.score(batches))
        kls.append((metrics["kl/text"], metrics["kl/image"]))
    assert max(kls[0]) <= 1e-8 and min(kls[1]) > 1e-6 and min(kls[2]) > 1e-6


def test_an_error_while_sampling_leaves_zero_3_whole(
    batches: list[PackedBatch], by_hand: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    """DeepSpeed's helper has no try/finally: training must go on correctly after an error in the rollout."""
    got, learner = learn(3, batches, failing=True)
    hooks = learner.engine.optimizer.parameter_offload.forward_hooks
    assert len(hooks) == len(make_learner(3).engine.optimizer.parameter_offload.forward_hooks) > 100
    assert not learner.policy.model.lm_head.weight.numel(), "parameters are split again"
    assert got["losses"] == pytest.approx(by_hand[0]["losses"], abs=1e-5)
    assert_close(weights_of(learner), by_hand[1], ONE_RANK)
    assert learner.engine.training
    with pytest.raises(KeyboardInterrupt), learner.sampling() as policy:
        assert not policy.training
        raise KeyboardInterrupt
    assert learner.engine.training


def test_weights_are_whole_while_sampling(policy: JanusPolicy) -> None:
    learner = make_learner(3)
    with learner.sampling() as seen:
        for (name, p), (_, q) in zip(seen.named_parameters(), policy.named_parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_kept_is_a_step_that_changes_nothing(stage: int, policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    nothing = packed(policy, rollouts, GROUP, keep=torch.zeros(len(rollouts), dtype=torch.bool))
    learner = make_learner(stage)
    metrics = learner.update(learner.score(nothing))
    assert metrics["loss"] == 0.0 and metrics["grad_norm"] == 0.0 and metrics["rollout/replay_logp_max_abs"] == 0.0
    assert_close(weights_of(learner), {n: p for n, p in policy.named_parameters() if p.requires_grad}, 0.0)


def test_frozen_parts_stay(batches: list[PackedBatch], policy: JanusPolicy) -> None:
    learner = make_learner(learning_rate=1e-2)
    learner.update(learner.score(batches))
    moved = {
        n
        for (n, p), q in zip(learner.policy.named_parameters(), policy.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved and not any(part in n for n in moved for part in ("vqmodel", "vision_model", ".aligner"))


def test_learning_rate_reaches_the_optimizer(batches: list[PackedBatch], policy: JanusPolicy) -> None:
    for stage in (0, 2):
        learner = make_learner(stage)
        learner.set_learning_rate(0.0)
        learner.update(learner.score(batches))
        assert_close(weights_of(learner), {n: p for n, p in policy.named_parameters() if p.requires_grad}, 0.0)


def test_bfloat16_training_keeps_float32_masters(batches: list[PackedBatch]) -> None:
    """Steps far below bfloat16's resolution add up; in bfloat16 weights alone each of them would round to nothing."""
    settings = LearnerSettings(learning_rate=2e-5, zero_stage=1, bf16=True)
    learner = Learner(sharp_policy().to(torch.bfloat16), Objective(), settings)
    weight = learner.policy.model.lm_head.weight  # type: ignore[attr-defined]
    before = weight.detach().clone()
    assert before.dtype == torch.bfloat16
    norms = [learner.update(learner.score(batches[1:3]))["grad_norm"] for _ in range(30)]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    coarse = before.abs() > 0.125  # half a unit in the last place is 5e-4 there, 25 steps
    assert float((weight != before)[coarse].float().mean()) > 0.05


def test_settings_of_deepspeed() -> None:
    """Our own loop drives accumulation; clipping is done once, by whoever can tell the norm."""
    for stage in range(4):
        config = deepspeed_config(LearnerSettings(learning_rate=1.0, zero_stage=stage, max_grad_norm=0.5), 10)
        assert config["zero_optimization"]["reduce_bucket_size"] == 10  # not 2 GB for ten numbers
        assert config["managed_gradient_accumulation"] is False and config["zero_optimization"]["stage"] == stage
        assert config["gradient_clipping"] == (0.0 if stage == 0 else 0.5)


# Two processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    out = tmp_path_factory.mktemp("two_ranks")
    warm.run(str(ROOT / "tests" / "support" / "helpers.py"), str(out), ranks=2)
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("case", ["stage0", "stage1", "stage2", "stage3", "failing3"])
def test_two_ranks_learn_what_one_does(
    case: str, two_ranks: tuple[Path, Any], by_hand: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    """Four micro-batches on one rank and two on the other; `failing3`: an error inside `sampling()` in between."""
    folder, results = two_ranks
    assert results[case]["losses"] == pytest.approx(by_hand[0]["losses"], abs=1e-5)
    assert results[case]["norms"] == pytest.approx(by_hand[0]["norms"], rel=1e-4)
    assert_close(torch.load(folder / f"{case}.pt", weights_only=True), by_hand[1], TWO_RANKS)


def test_two_ranks_share_sequence_means(two_ranks: tuple[Path, Any], batches: list[PackedBatch]) -> None:
    """Loss types that average over sequences: the idle batches that keep ranks in step are no sequences."""
    folder, results = two_ranks
    expected, learner = learn(0, batches, loss_type="grpo")
    for case in ("grpo2", "pruned3"):
        assert results[case]["norms"] == pytest.approx(expected["norms"], rel=1e-4), case
        assert_close(torch.load(folder / f"{case}.pt", weights_only=True), weights_of(learner), TWO_RANKS)


def test_a_checkpoint_written_under_zero_3_on_two_ranks_loads(two_ranks: tuple[Path, Any]) -> None:
    folder, _ = two_ranks
    loaded = JanusPolicy.from_pretrained(folder / "checkpoint")
    weights = torch.load(folder / "failing3.pt", weights_only=True)
    assert_close({n: p for n, p in loaded.named_parameters() if p.requires_grad}, weights, 0.0)
    assert (folder / "checkpoint" / "model.safetensors").is_file()
