"""Group-relative RL, the whole loop: prompts -> rollout -> reward -> advantage and pruning -> pack -> loss -> step.

Dims: P prompts, G members, S = P * G trajectories, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from syncr1.kernels.api import dgs_select
from syncr1.kernels.reference.advantage import SPREAD

from ..forward.packing import pack
from ..records import MODALITY_NAMES, PackedBatch, Prompt, Rollout, StepMetrics
from ..rewards.ensemble import RewardSet, combine
from ..rewards.reward import RewardTable, score
from ..rollout.preview_gate import PreviewGate
from ..rollout.sampler import RolloutEngine, RolloutStats, Sampling
from ..settings.train_config import TrainConfig
from ..stopwatch import Stopwatch, split
from .credit import credited_rewards, shared_within_samples
from .learner import Learner
from .metrics import merged

OnStep = Callable[[StepMetrics, Sequence[Rollout], Tensor], None]
"""Called after each step with its metrics, its trajectories and their total rewards [S] (NaN: unrewarded)."""


OnStage = Callable[[str, int], None]
"""Called with a stage's name and the step before it begins."""


CreditRule = Callable[[Tensor, Sequence[Rollout]], Tensor]
"""Rewards [S, K] and trajectories to what text and image tokens answer for: [S, 2] float32; NaN = nothing."""


class Prompts(Protocol):
    """An endless, resumable source of prompts."""

    def next_step(self) -> list[Prompt]: ...


class Trainer:
    """Everything a step needs, put together once.

    Args:
        config: settings of the run.
        learner: owns the policy's weights.
        rollouts: samples from that policy; used inside `learner.sampling()`.
        prompts: source of each step's prompts, this rank's share.
        rewards: reward functions, weights and kinds.
        preview: preview DGS; None draws every image to its end.
        on_step: where metrics and samples go.
        credit: rewards to what text and image tokens answer for; None: `config.credit`, samples sharing one reward.
        on_stage: who watches that no stage takes for ever.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        rollouts: RolloutEngine,
        prompts: Prompts,
        rewards: RewardSet,
        preview: PreviewGate | None = None,
        on_step: OnStep | None = None,
        credit: CreditRule | None = None,
        on_stage: OnStage = lambda stage, step: None,
    ) -> None:
        self.config, self.learner, self.rollouts = config, learner, rollouts
        self.prompts, self.rewards = prompts, rewards
        self.preview, self.on_step = preview, on_step
        self.credit, self.on_stage = credit or self._credit, on_stage
        self.step, self._time = 0, Stopwatch()

    def train(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Runs to `max_steps`, or until `stop`, asked between steps, says so; all ranks must get one answer."""
        while self.step < self.config.max_steps and not stop():
            self.train_step()

    def train_step(self) -> StepMetrics:
        """One rollout and its updates."""
        config, stage = self.config, self._stage
        self._time = Stopwatch()
        self.learner.set_learning_rate(learning_rate(config, self.step))
        prompts = self.prompts.next_step()
        with stage("rollout"), self.learner.sampling() as policy:
            rollouts = self.rollouts.generate(prompts, self._sampling(), self.preview)
        with stage("reward"):
            table = score(rollouts, self.rewards.functions, timeout=config.reward_timeout, step=self.step)
        with stage("pack"):
            credit_S2 = self.credit(table.values, rollouts)
            keep_S = self._keep(rollouts, credit_S2)
            if config.scale_rewards == "batch" and self.learner.objective.scale == "batch":
                credit_S2 = credit_S2 / self._batch_std(credit_S2)
            batches = pack(
                policy,
                rollouts,
                credit_S2,
                keep_S,
                num_generations=config.num_generations,
                max_tokens=config.max_tokens_per_microbatch,
                share_prefix=config.share_prefix,
            )
        with stage("score"):
            scored = self.learner.score(batches)
        with stage("update"):
            learned = self.learner.update(scored)
        total_S = combine(shared_within_samples(table.values, rollouts), self.rewards.weight_tensor())
        seconds = split(self._time.seconds, rollout=self.rollouts.stats.seconds, update=self.learner.seconds)
        metrics = StepMetrics(
            step=self.step,
            values=self._metrics(rollouts, table, total_S, keep_S, batches, learned, seconds),
            seconds=seconds,
        )
        self.step += 1
        if self.on_step is not None:
            self.on_step(metrics, rollouts, total_S)
        return metrics

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.on_stage(name, self.step)
        with self._time(name):
            yield

    def _credit(self, values_SK: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
        return credited_rewards(shared_within_samples(values_SK, rollouts), self.rewards, self.config.credit)

    def _sampling(self) -> Sampling:
        c = self.config
        return Sampling(
            num_generations=c.num_generations,
            temperature=c.temperature,
            max_text_tokens=c.max_completion_length,
            cfg_weight=c.cfg_weight,
            seed=c.seed,
            step=self.step,
        )

    def _keep(self, rollouts: Sequence[Rollout], credit_S2: Tensor) -> Tensor:
        """[S] bool: the DGS rule, and every trajectory of an anchor (the KL term needs it)."""
        c = self.config
        rewards: Tensor | Mapping[str, Tensor] = credit_S2[:, 0]
        if c.credit == "per_segment":
            rewards = {"text": credit_S2[:, 0], "image": credit_S2[:, 1]}
        offsets = torch.arange(0, len(rollouts) + 1, c.num_generations, dtype=torch.int32)
        keep = dgs_select(
            rewards, offsets, rule=c.dgs, mass=c.dgs_mass, keep=c.dgs_keep, seed=c.seed * 100_003 + self.step
        )
        anchors = torch.tensor([not rollout.prompt.rewarded for rollout in rollouts])
        finished = torch.tensor([not rollout.dropped for rollout in rollouts])
        return (keep | anchors if self.learner.objective.anchor_beta > 0 else keep & ~anchors) & finished

    def _batch_std(self, credit_S2: Tensor) -> Tensor:
        """[2]: standard deviation of all of the step's rewards, over ranks, which no micro-batch knows."""
        valid, values = ~credit_S2.isnan(), credit_S2.nan_to_num(nan=0.0).double()
        count, total, squares = self.learner.all_reduce(
            torch.stack([valid.double().sum(0), values.sum(0), values.square().sum(0)])
        )
        variance = (squares - total.square() / count.clamp(min=1)).clamp(min=0) / (count - 1).clamp(min=1)
        return (variance.sqrt() + 1e-4).float()

    def _metrics(
        self,
        rollouts: Sequence[Rollout],
        table: RewardTable,
        total_S: Tensor,
        keep_S: Tensor,
        batches: Sequence[PackedBatch],
        learned: dict[str, float],
        seconds: Mapping[str, float],
    ) -> dict[str, float]:
        """Of the step, over all ranks. Collective."""
        c = self.config
        sampled = [sum(s.tokens.numel() for s in rollout.segments) for rollout in rollouts]
        texts = [s for rollout in rollouts for s in rollout.segments if s.kind == "text"]
        elapsed = sum(seconds.values())
        values = trl_names(learned)
        if c.replay_check_steps == 0 or self.step % c.replay_check_steps:
            values.pop("rollout/replay_logp_max_abs", None)
        values |= {
            "reward": _mean(total_S),
            **_group_spread(total_S, c.num_generations),
            **table.means(),
            "reward_failures": float(sum(table.failures.values())),
            "learning_rate": learning_rate(c, self.step),
            "completions/mean_length": _mean(torch.tensor([float(s.tokens.numel()) for s in texts])),
            "completions/clipped_ratio": _mean(torch.tensor([float(s.truncated) for s in texts])),
            "rollout/attempts_mean": _mean(torch.tensor([float(rollout.attempts) for rollout in rollouts])),
            "rollout/dropped_fraction": _mean(torch.tensor([float(rollout.dropped) for rollout in rollouts])),
            "dgs/keep_fraction": float(keep_S.float().mean()),
            **_savings(batches, self.rollouts.stats, sum(sampled)),
            "num_tokens": float(sum(sampled)),
            "tokens_per_second": sum(sampled) / max(elapsed, 1e-9),
            "step_time": elapsed,
        }
        if self.preview is not None:
            values["rollout/preview_threshold"] = math.nan if self.preview.threshold is None else self.preview.threshold
            values["rollout/preview_acceptance"] = self._adapt_preview(self.preview)
        return merged(self.learner.gathered(values))

    def _adapt_preview(self, preview: PreviewGate) -> float:
        """One threshold for all ranks: each took its own from its first previews, and all count for the next move."""
        own = torch.tensor([preview.threshold or 0.0, float(preview.threshold is not None)], dtype=torch.float64)
        accepted, tried, total, known = self.learner.all_reduce(torch.cat([preview.counts, own])).tolist()
        preview.threshold = total / known if known else None
        return preview.adapt(int(accepted), int(tried))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then linearly down to a tenth at `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = 1.0 - (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.9 * left)


def _savings(batches: Sequence[PackedBatch], stats: RolloutStats, num_sampled: int) -> dict[str, float]:
    """What pruning, previews and sharing left undone."""
    trained = sum(int(batch.loss_mask.sum()) for batch in batches)
    computed = sum(batch.num_tokens for batch in batches)
    drawn = stats.image_tokens + stats.image_tokens_saved
    return {
        "dgs/tokens_saved_fraction": 1.0 - trained / max(1, num_sampled),
        "dgs/decode_steps_saved_fraction": stats.image_tokens_saved / max(1, drawn),
        "pack/tokens": float(computed),
        "pack/sharing_ratio": sum(batch.num_unshared_tokens for batch in batches) / max(1, computed),
        "rollout/prefill_tokens": float(stats.prefill_tokens),
        "rollout/kv_mib": stats.kv_bytes / 2**20,
    }


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if values.numel() else math.nan


def _group_spread(total_S: Tensor, num_generations: int) -> dict[str, float]:
    """`reward_std`, the mean spread within groups, and the share of groups without any; anchors are left out."""
    groups = total_S.view(-1, num_generations)
    groups = groups[~groups.isnan().any(1)]
    if groups.numel() == 0:
        return {"reward_std": math.nan, "frac_reward_zero_std": math.nan}
    equal = groups.amax(1) - groups.amin(1) <= SPREAD * groups.abs().amax(1)
    return {"reward_std": float(groups.std(1).mean()), "frac_reward_zero_std": float(equal.float().mean())}


def trl_names(learned: Mapping[str, float]) -> dict[str, float]:
    """The loss's per-modality metrics, with TRL's totals over both: `kl`, `entropy`, `clip_ratio/…`."""
    tokens = {name: learned.get(f"tokens/{name}", 0.0) for name in MODALITY_NAMES}
    count = max(1.0, sum(tokens.values()))

    def total(metric: str) -> float:
        known = {name: learned.get(f"{metric}/{name}", 0.0) for name in tokens}
        return sum(tokens[name] * value for name, value in known.items() if value == value) / count

    low, high = total("clip_low"), total("clip_high")
    totals = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    return {**learned, "kl": total("kl"), "entropy": total("entropy"), **totals}
