"""Group-relative RL, the whole loop: prompts -> rollout -> reward -> credit and pruning -> pack -> loss -> step.

Dims: P prompts, G members, S = P * G trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RewardError, RewardsFailed
from ..forward.packing import pack
from ..records import PackedBatch, Prompt, Rollout, StepMetrics
from ..rewards.ensemble import RewardSet
from ..rewards.scoring import RewardTable, score
from ..rollout.preview_gate import PreviewGate
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling, truncation_of
from ..settings.train_config import TrainConfig
from ..stopwatch import Stopwatch, split
from .credit import Credit, CreditRule, StepPlan, credited_rewards, plan_of
from .failing import Failing
from .learner import Learner
from .metrics import counted, merged, of_guidance, of_rewards, of_rollouts, of_savings, trl_names
from .refill import Drawn, Waste, refilled
from .schedule import learning_rate

OnStep = Callable[[StepMetrics, Sequence[Rollout], Tensor], None]
"""Called after each step with its metrics, its trajectories and their total rewards [S] (NaN: unrewarded)."""


OnStage = Callable[[str, int], None]
"""Called with a stage's name and the step before it begins."""


class Prompts(Protocol):
    """An endless, resumable source of prompts."""

    def next_step(self) -> list[Prompt]: ...

    def more(self, wanted: Sequence[int]) -> list[Prompt] | None:
        """Others for the step under way, by ranks, as `PromptStream.more`; asked for by `refill`."""
        ...


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
        credit: rewards to credit; None: `credited_rewards` by `config.credit`.
        on_stage: what watches that no stage takes forever.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        rollouts: RolloutEngine,
        prompts: Prompts,
        rewards: RewardSet,
        preview: PreviewGate | None = None,
        on_step: OnStep = lambda metrics, rollouts, totals: None,
        credit: CreditRule | None = None,
        on_stage: OnStage = lambda stage, step: None,
    ) -> None:
        self.config, self.learner, self.rollouts = config, learner, rollouts
        self.prompts, self.rewards = prompts, rewards
        self.preview, self.on_step = preview, on_step
        self.credit = credit or partial(credited_rewards, rewards=rewards, credit=config.credit)
        self.on_stage = on_stage
        self.step, self._time = 0, Stopwatch()
        self._failing, self._ended = Failing(rewards.names), ""

    def train(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Runs to `max_steps`, or until `stop`, asked between steps, says so; all ranks must get one answer.

        Raises:
            RewardsFailed: a reward works for nobody (failing.py); on all ranks, after the same step.
        """
        while self.step < self.config.max_steps and not stop():
            self.train_step()

    def train_step(self) -> StepMetrics:
        """One rollout and its updates."""
        config, learner, stage = self.config, self.learner, self._stage
        self._time = Stopwatch()
        learner.set_learning_rate(learning_rate(config, self.step))
        drawn, waste = self._draw(self.prompts.next_step()), None
        if config.refill:
            drawn, waste = self._refilled(drawn)
        with stage("pack"):
            credit = self.credit(drawn.table.values, drawn.rollouts)
            plan = plan_of(
                credit,
                drawn.rollouts,
                config,
                step=self.step,
                holds_anchors=learner.objective.anchor_beta > 0,
                sum_over_ranks=learner.all_reduce,
            )
            batches = self._packed(drawn.rollouts, plan)
        with stage("score"):
            scored = learner.score(batches)
        with stage("update"):
            learned = learner.update(scored)
        metrics = self._metrics(drawn, waste, credit, plan.keep_S, batches, learned)
        self.step += 1
        self.on_step(metrics, drawn.rollouts, credit.total_S)
        if self._ended:
            raise RewardsFailed(f"step {self.step}: {self._ended}")
        return metrics

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.on_stage(name, self.step)
        with self._time(name):
            yield

    def _draw(self, prompts: Sequence[Prompt]) -> Drawn:
        """Trajectories of prompts, possibly none, and their rewards. Collective under ZeRO-3."""
        with self._stage("rollout"), self.learner.sampling():
            rollouts = self.rollouts.generate(prompts, self._sampling(), self.preview)
        with self._stage("reward"):
            return Drawn(rollouts=rollouts, table=self._scored(rollouts), stats=self.rollouts.stats)

    def _refilled(self, drawn: Drawn) -> tuple[Drawn, Waste]:
        """What is left once groups without variance are drawn anew, and what was given up for it. Collective."""

        def credit(drawn: Drawn) -> tuple[Tensor, Tensor]:
            found = self.credit(drawn.table.values, drawn.rollouts)
            return found.total_S, found.tokens_S2

        return refilled(
            drawn,
            self.config.refill,
            credit=credit,
            wanted_by_ranks=self.learner.of_each_rank,
            more=self.prompts.more,
            draw=self._draw,
            num_generations=self.config.num_generations,
        )

    def _scored(self, rollouts: Sequence[Rollout]) -> RewardTable:
        """The rewards of the step; NaN all over where a function broke its contract, which ends the run after it."""
        try:
            return score(rollouts, self.rewards.functions, timeout=self.config.reward_timeout, step=self.step + 1)
        except RewardError as error:
            return self._failing.broken(error, len(rollouts))

    def _sampling(self) -> Sampling:
        c = self.config
        return Sampling(
            num_generations=c.num_generations,
            temperature=c.temperature,
            image_temperature=c.image_temperature,
            max_text_tokens=c.max_completion_length,
            cfg_weight=c.cfg_weight,
            unconditional=c.unconditional,
            drawing_turn=c.drawing_turn,
            **truncation_of(c),
            seed=c.seed,
            step=self.step,
        )

    def _packed(self, rollouts: Sequence[Rollout], plan: StepPlan) -> list[PackedBatch]:
        c = self.config
        return pack(
            self.learner.policy,
            rollouts,
            plan.advantages_S2,
            plan.keep_S,
            num_generations=c.num_generations,
            max_tokens=c.max_tokens_per_microbatch,
            share_prefix=c.share_prefix,
            guided=self.learner.objective.policy_logp != "conditional" and c.cfg_weight != 1.0,
        )

    def _metrics(
        self,
        drawn: Drawn,
        waste: Waste | None,
        credit: Credit,
        keep_S: Tensor,
        batches: Sequence[PackedBatch],
        learned: dict[str, float],
    ) -> StepMetrics:
        """Of the step, over all ranks. Collective."""
        c, rollouts = self.config, drawn.rollouts
        seconds = split(self._time.seconds, rollout=drawn.stats.seconds, update=self.learner.seconds)
        num_kept, elapsed = sum(s.tokens.numel() for r in rollouts for s in r.segments), sum(seconds.values())
        num_sampled = num_kept + (0 if waste is None else waste.tokens)
        values = {**trl_names(learned), **self.learner.scoring}
        if c.replay_check_steps == 0 or self.step % c.replay_check_steps:
            values.pop("rollout/replay_logp_max_abs", None)
        elif c.cfg_weight != 1.0:
            values |= of_guidance(rollouts)
        values |= {
            **of_rewards(drawn.table, credit.total_S, c.num_generations),
            "learning_rate": learning_rate(c, self.step),
            **of_rollouts(rollouts),
            **counted({"dgs/keep_fraction": float(keep_S.float().mean())}, keep_S.numel()),
            **of_savings(batches, drawn.stats, num_kept),
            "num_tokens": float(num_sampled),
            "tokens_per_second": num_sampled / max(elapsed, 1e-9),
            "step_time": elapsed,
        }
        if waste is not None:
            values |= waste.metrics(credit.total_S, num_kept)
        if self.preview is not None:
            values["rollout/preview_threshold"] = math.nan if self.preview.threshold is None else self.preview.threshold
            values["rollout/preview_acceptance"] = self._adapt_preview(self.preview)
        shown = sum(rollout.prompt.rewarded and not rollout.dropped for rollout in rollouts)
        ranks = self.learner.gathered(values | self._failing.told(drawn.table, shown))
        self._ended = self._failing.heard(ranks)
        return StepMetrics(step=self.step, values=merged(ranks), seconds=seconds)

    def _adapt_preview(self, preview: PreviewGate) -> float:
        """One threshold for all ranks: each took its own from its first previews, and all count for the next move."""
        own = torch.tensor([preview.threshold or 0.0, float(preview.threshold is not None)], dtype=torch.float64)
        accepted, tried, total, known = self.learner.all_reduce(torch.cat([preview.counts, own])).tolist()
        preview.threshold = total / known if known else None
        return preview.adapt(int(accepted), int(tried))
