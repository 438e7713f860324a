"""The loop: same seed, same run; credit, anchors, pruning and schedules reach the optimizer; reward goes up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, own_process_group, same_bits, sharp_policy, weights_of
from made import short_base, world_folder
from torch import Tensor

from syncr1.engine.data.prompts import load_anchors, load_training_prompts
from syncr1.engine.learn.credit import credited_rewards
from syncr1.engine.learn.from_settings import objective_of, sampler_of, settings_of
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set, stream_of
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import PackedBatch, Prompt, Rollout, StepMetrics
from syncr1.engine.rewards.ensemble import RewardSet, combine
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.kernels.api import dgs_select, group_advantages

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
TIMES = {"step_time", "tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def world() -> Path:
    return world_folder()


@pytest.fixture(scope="module")
def rewards(world: Path) -> RewardSet:
    return build_reward_set(config_of(), sharp_policy(), load_training_prompts(world))


def config_of(**changes: Any) -> SyncR1Config:
    small: dict[str, Any] = {
        "max_steps": 3,
        "prompts_per_step": 4,
        "num_generations": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "max_completion_length": 6,
        "anchor_fraction": 0.25,
        "beta": 0.02,
    }
    return SyncR1Config(**(small | changes))


class WatchedLearner(Learner):
    """A real learner that remembers what it was given and at which rate it learnt."""

    def update(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        self.given = getattr(self, "given", [])
        self.given.append((batches, self.engine.optimizer.param_groups[0]["lr"]))
        return super().update(batches)


class Always:
    """The same prompts at every step."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def next_step(self) -> list[Prompt]:
        return self.prompts


class Run:
    """A trainer with everything real around it, and what it did."""

    def __init__(
        self,
        config: SyncR1Config,
        world: Path,
        rewards: RewardSet,
        prompts: list[Prompt] | None = None,
        policy: JanusPolicy | None = None,
    ) -> None:
        policy = sharp_policy() if policy is None else policy
        self.learner = WatchedLearner(
            policy, objective_of(config, policy.num_image_tokens, config.anchor_beta), settings_of(config)
        )
        stream = stream_of(config, load_training_prompts(world), load_anchors(world))
        self.steps: list[tuple[StepMetrics, Sequence[Rollout], Tensor]] = []
        self.trainer = Trainer(
            config,
            self.learner,
            sampler_of(config, policy),
            stream if prompts is None else Always(prompts),
            rewards,
            build_preview(config, rewards),
            lambda *step: self.steps.append(step),
        )

    def train(self) -> Run:
        self.trainer.train()
        return self

    def metrics(self) -> list[dict[str, float]]:
        return [{k: v for k, v in metrics.values.items() if k not in TIMES} for metrics, _, _ in self.steps]


def same(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return repr(a) == repr(b)


def test_two_runs_with_one_seed_are_one_run(world: Path, rewards: RewardSet) -> None:
    """Bitwise: metrics, trajectories, weights. Another seed gives another run."""
    first, second, other = (Run(config_of(seed=seed, max_steps=2), world, rewards).train() for seed in (1, 1, 2))
    assert len(first.steps) == 2 and same(first.metrics(), second.metrics())
    assert not same(first.metrics(), other.metrics())
    for (_, a, _), (_, b, _) in zip(first.steps, second.steps, strict=True):
        assert [r.uid for r in a] == [r.uid for r in b] and [r.text for r in a] == [r.text for r in b]
    weights = [weights_of(run.learner) for run in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    start = dict(sharp_policy().named_parameters())
    assert sum(not torch.equal(weights[0][name], start[name]) for name in weights[0]) > 20


def test_metrics_have_trls_names(world: Path, rewards: RewardSet) -> None:
    run = Run(config_of(max_steps=1), world, rewards).train()
    metrics, rollouts, totals = run.steps[0]
    assert metrics.step == 0
    expected = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "loss",
        "grad_norm",
        "learning_rate",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "num_tokens",
        "step_time",
        "rewards/identity/mean",
        "rewards/judge/mean",
        "rewards/text/mean",
        "rollout/replay_logp_max_abs",
        "rollout/preview_acceptance",
        "dgs/keep_fraction",
        "dgs/tokens_saved_fraction",
    }
    assert expected <= set(metrics.values)
    assert all(math.isfinite(metrics.values[name]) for name in expected)
    assert metrics.values["rollout/replay_logp_max_abs"] <= 1e-4
    assert metrics.values["reward"] == pytest.approx(float(totals.nanmean()))
    assert len(rollouts) == 16 and metrics.values["reward_failures"] == 0


def test_what_a_reward_logs_is_in_the_step_s_metrics_and_rows(world: Path) -> None:
    """TRL's hooks in a training: the state counts, metrics keep their names, columns go with the trajectories."""
    steps: list[tuple[int, int]] = []

    def mine(*, completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("mine/words", sum(map(len, completions)) / len(completions))
        log_metric("reward", 7.0)
        log_extra("said", completions)
        return [float(len(text)) for text in completions]

    rewards = RewardSet(functions={"mine": mine}, weights=(1.0,), kinds=("text",))
    run = Run(config_of(max_steps=2, preview_fraction=0.0), world, rewards).train()
    assert steps == [(0, 2), (1, 2)]
    for metrics, rollouts, _ in run.steps:
        shown = [rollout for rollout in rollouts if rollout.prompt.rewarded]
        said = [rollout.text if rollout.prompt.rewarded else None for rollout in rollouts]
        assert metrics.extras == {"said": said} and 0 < len(shown) < len(rollouts)
        words = sum(len(rollout.text) for rollout in shown) / len(shown)
        assert metrics.values["mine/words"] == pytest.approx(words)
        assert metrics.values["logged/reward"] == 7.0 != metrics.values["reward"], "the run's own keeps its name"


def test_credited_rewards_by_hand() -> None:
    nan, total = math.nan, torch.tensor([1.0, 0.2, 0.25, math.nan])
    rewards = RewardSet(
        functions={"id": list, "judge": list, "text": list}, weights=(0.2, 0.3, 0.5), kinds=("image", "image", "text")
    )  # type: ignore[dict-item]
    trajectories = [
        Rollout(prompt=make_prompt("x"), member=m, prompt_tokens=torch.zeros(0), prompt_image=None, segments=())
        for m in range(4)
    ]
    values = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, nan], [nan, nan, 0.5], [nan, nan, nan]])
    for credit in ("shared", "image_only"):
        both = credited_rewards(values, trajectories, rewards, credit)
        torch.testing.assert_close(both.tokens_S2, total[:, None].expand(4, 2), equal_nan=True)
        torch.testing.assert_close(both.total_S, total, equal_nan=True)
    own = credited_rewards(values, trajectories, rewards, "per_segment")
    torch.testing.assert_close(own.total_S, total, equal_nan=True)
    torch.testing.assert_close(
        own.tokens_S2, torch.tensor([[0.5, 0.5], [nan, 0.2], [0.25, nan], [nan, nan]]), equal_nan=True
    )
    text_alone = replace(rewards, functions={"text": list}, weights=(0.5,), kinds=("text",))  # type: ignore[dict-item]
    assert credited_rewards(values[:, 2:], trajectories, text_alone, "per_segment").tokens_S2[:, 1].isnan().all()


def test_anchors_are_trained_on_without_advantage(world: Path, rewards: RewardSet) -> None:
    """Every anchor is in a batch of anchors, unrewarded, so only the KL term acts on it; nothing else is like that."""
    run = Run(config_of(max_steps=1), world, rewards).train()
    (rewarded, anchors), _ = run.learner.given[0]
    assert anchors.anchor and not rewarded.anchor and not anchors.advantages.any() and rewarded.advantages.any()
    assert len(anchors.advantages) == 4 == sum(not r.prompt.rewarded for r in run.steps[0][1])
    assert (anchors.cu_seqlens.diff() > 0).all() and anchors.ref_logp is not None


def test_anchors_alone_hold_the_policy_still(world: Path, rewards: RewardSet) -> None:
    """At the reference the KL term has no gradient; away from it, it pulls back."""
    anchors = load_anchors(world)[:2]
    run = Run(config_of(max_steps=1, beta=0.0, anchor_beta=0.5), world, rewards, anchors)
    run.trainer.train_step()
    assert run.metrics()[0]["grad_norm"] <= 1e-4 and math.isnan(run.metrics()[0]["reward"])
    with torch.no_grad():
        run.learner.policy.model.lm_head.weight.mul_(1.05)  # type: ignore[attr-defined]
        run.learner.policy.model.model.generation_head.vision_head.weight.mul_(1.05)  # type: ignore[attr-defined]
    run.trainer.train_step()
    metrics = run.metrics()[1]
    assert metrics["grad_norm"] > 1e-2 and metrics["kl"] > 1e-5
    told = [name.partition("/")[2] for name in metrics if name.startswith("kl_anchors/")]
    assert told and all(metrics[f"kl_anchors/{kind}"] == metrics[f"kl/{kind}"] for kind in told), "all are anchors"


def test_anchors_are_dropped_without_a_kl_term(world: Path, rewards: RewardSet) -> None:
    prompts = [load_anchors(world)[0], *load_training_prompts(world)[:1]]
    run = Run(
        config_of(max_steps=1, beta=0.0, anchor_beta=0.0, anchor_fraction=0.0, dgs="none"), world, rewards, prompts
    ).train()
    (batch,), _ = run.learner.given[0]
    assert len(batch.advantages) == 4 and batch.advantages.any() and batch.ref_logp is None


@pytest.mark.parametrize("rule", ["variance_mass", "top_k"])
def test_pruning_is_that_of_dgs_select(world: Path, rewards: RewardSet, rule: Any) -> None:
    config = config_of(
        max_steps=1, dgs=rule, dgs_keep=2 if rule == "top_k" else None, anchor_fraction=0.0, dgs_mass=0.6
    )
    run = Run(config, world, rewards).train()
    metrics, _, totals = run.steps[0]
    keep = dgs_select(totals, torch.arange(0, 17, 4), rule=rule, mass=0.6, keep=config.dgs_keep)
    (batch,), _ = run.learner.given[0]
    trained = keep.view(4, 4)[keep.view(4, 4).any(1)].flatten()
    assert torch.equal(batch.cu_seqlens.diff() > 0, trained) and not trained.all()
    assert metrics.values["dgs/keep_fraction"] == pytest.approx(float(keep.float().mean()))
    assert metrics.values["dgs/tokens_saved_fraction"] == pytest.approx(
        1 - float(batch.loss_mask.sum()) / metrics.values["num_tokens"]
    )


def test_batch_scale_knows_the_whole_step(world: Path, rewards: RewardSet) -> None:
    """Each group in a micro-batch of its own: advantages are still divided by the deviation over all of them."""
    config = config_of(max_steps=1, scale_rewards="batch", dgs="none", max_tokens_per_microbatch=1)
    run = Run(config, world, rewards).train()
    batches, _ = run.learner.given[0]
    assert len(batches) == 4
    got = torch.cat([b.advantages[:, 0] for b in batches])
    expected = group_advantages(run.steps[0][2], torch.arange(0, 17, 4), scale="batch")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_rate_of_each_step_is_the_schedules(world: Path, rewards: RewardSet) -> None:
    run = Run(config_of(warmup_steps=2), world, rewards).train()
    used = [rate for _, rate in run.learner.given]
    assert used == [metrics["learning_rate"] for metrics in run.metrics()] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_each_step_draws_afresh(world: Path, rewards: RewardSet) -> None:
    prompts = load_training_prompts(world)[:2]
    run = Run(config_of(learning_rate=1e-12, max_steps=2), world, rewards, prompts).train()
    first, second = (torch.cat([r.segments[-1].tokens for r in rollouts]) for _, rollouts, _ in run.steps)
    assert not torch.equal(first, second)


def test_training_raises_the_reward_and_not_training_does_not(world: Path) -> None:
    """8 steps on 8 prompts from a short base: 0.32 to about 0.60; one at a learning rate of 0, still 0.32."""
    checkpoint = short_base()
    everything = load_training_prompts(world)
    prompts = [p for p in everything if p.task == "rea" and p.concept == everything[0].concept][:8]
    gains = {}
    for rate, steps in ((2e-3, 8), (1e-12, 1)):
        policy = JanusPolicy.from_pretrained(checkpoint)
        config = config_of(
            max_steps=steps,
            prompts_per_step=8,
            num_generations=8,
            learning_rate=rate,
            warmup_steps=2,
            anchor_fraction=0.0,
            beta=0.0,
            preview_fraction=0.0,
            max_completion_length=16,
        )
        rewards = build_reward_set(config, policy, prompts)
        run = Run(config, world, rewards, prompts, policy)

        def mean_reward(run: Run = run, rewards: RewardSet = rewards) -> float:
            with run.learner.sampling() as seen:
                drawn = generate(seen, prompts, Sampling(num_generations=8, seed=99, cfg_weight=1.5))
            return float(combine(score(drawn, rewards.functions).values, rewards.weight_tensor()).nanmean())

        before = mean_reward()
        run.train()
        gains[rate] = mean_reward() - before
    assert gains[2e-3] > 0.15 and abs(gains[1e-12]) < 1e-6


@pytest.mark.parametrize(
    "changed", [{"share_prefix": False}, {"gradient_checkpointing": True}], ids=lambda c: next(iter(c))
)
def test_how_it_is_computed_changes_no_result(world: Path, rewards: RewardSet, changed: dict[str, Any]) -> None:
    """Sharing prompts and recomputing activations are about work and memory alone."""
    usual, other = (Run(config_of(max_steps=2, dgs="none", **c), world, rewards).train() for c in ({}, changed))
    for a, b in zip(usual.metrics(), other.metrics(), strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
        assert a["pack/sharing_ratio"] > 1.3
        if "share_prefix" in changed:
            assert b["pack/sharing_ratio"] == 1.0
            assert b["pack/tokens"] == pytest.approx(a["pack/tokens"] * a["pack/sharing_ratio"])


def test_without_guidance_the_conventions_are_one(world: Path, rewards: RewardSet) -> None:
    """At w = 1 the free branch is left out of sampling and of training: the same bits, and the same cost."""
    one, other = (
        Run(config_of(max_steps=1, cfg_weight=1.0, policy_logp=how), world, rewards).train()
        for how in ("conditional", "guided_detached")
    )
    assert same(one.metrics(), other.metrics()) and same_bits(weights_of(one.learner), weights_of(other.learner))


def test_guided_steps_replay_and_count_their_free_branch(world: Path, rewards: RewardSet) -> None:
    """Anchors, previews and pruning around it; the ratio of a first update is exactly 1."""
    config = config_of(max_steps=1, cfg_weight=3.0, policy_logp="guided", unconditional="pads")
    run = Run(config, world, rewards).train()
    (metrics,), (batches, _) = run.metrics(), run.learner.given[0]
    assert all(metrics[f"ratio_{end}/{kind}"] == 1.0 for end in ("min", "max") for kind in ("text", "image"))
    assert metrics["rollout/replay_logp_max_abs"] <= 1e-4 and metrics["rollout/guidance_logp_mean_abs"] > 0.1
    assert metrics["kl"] <= 1e-7
    twins = [batch.free for batch in batches if batch.free is not None]
    assert len(twins) == len(batches) and sum(free.rows.numel() for free in twins) > 0
    own = sum(batch.prefix_tokens.numel() + batch.tokens.numel() for batch in batches)
    assert metrics["pack/tokens"] == own + sum(free.num_tokens for free in twins)


def test_what_a_preview_drops_is_neither_rewarded_nor_trained(world: Path, rewards: RewardSet) -> None:
    """A gate that nothing passes: two of four members draw on; the others cost no tokens and no reward is asked for."""
    config = config_of(
        max_steps=1,
        preview_fraction=0.5,
        preview_threshold=0.99,
        preview_max_attempts=1,
        preview_min_keep=2,
        anchor_fraction=0.0,
        dgs="none",
    )
    run = Run(config, world, rewards).train()
    (metrics, rollouts, totals), ((batches, _),) = run.steps[0], run.learner.given
    drawing = [r for r in rollouts if "image" in r.prompt.segments]
    dropped = torch.tensor([r.dropped for r in rollouts])
    assert int(dropped.sum()) == len(drawing) // 2 > 0
    assert totals[dropped].isnan().all() and not totals[~dropped].isnan().any()
    trained = sum(int(batch.loss_mask.sum()) for batch in batches)
    assert trained == sum(len(s.tokens) for r in rollouts if not r.dropped for s in r.segments)
    values = metrics.values
    assert values["rollout/dropped_fraction"] == pytest.approx(float(dropped.float().mean()))
    # Half of the members save half of their image: a quarter of all image tokens.
    assert values["dgs/decode_steps_saved_fraction"] == pytest.approx(0.25)
    assert values["dgs/tokens_saved_fraction"] == pytest.approx(1 - trained / values["num_tokens"])
    assert values["reward_failures"] == 0


def test_every_stage_is_timed(world: Path, rewards: RewardSet) -> None:
    (metrics, _, _) = Run(config_of(max_steps=1), world, rewards).train().steps[0]
    rollout = {f"rollout/{stage}" for stage in ("see", "prefill", "text", "image", "draw", "other")}
    update = {f"update/{stage}" for stage in ("forward", "backward", "optimizer", "other")}
    stages = rollout | update | {"reward", "pack", "score"}
    assert set(metrics.seconds) == stages and all(value >= 0 for value in metrics.seconds.values())
    assert metrics.values["step_time"] == pytest.approx(sum(metrics.seconds.values()))
