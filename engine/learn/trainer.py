"""Group-relative RL, the whole loop: prompts -> rollout -> reward -> credit and pruning -> pack -> loss -> step.

Dims: P prompts, G members, S = P * G trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..errors import RewardsFailed
from ..forward.masked_states import MaskedPlan
from ..forward.packing import pack
from ..records import PackedBatch, Rollout, StepMetrics
from ..rewards.ensemble import RewardSet
from ..rollout.preview_gate import PreviewGate
from ..rollout.sampler import RolloutEngine
from ..settings.train_config import TrainConfig
from ..stopwatch import Stopwatch, split
from .ahead import Ahead
from .credit import Credit, CreditRule, StepPlan, credit_of, plan_of
from .failing import Failing
from .learner import Learner
from .metrics import (
    counted,
    merged,
    of_guidance,
    of_logged,
    of_rewards,
    of_rollouts,
    of_savings,
    taken_logged,
    trl_names,
    with_logged,
)
from .schedule import learning_rate
from .trajectories import Gathered, Gatherer, Prompts

OnStep = Callable[[StepMetrics, Sequence[Rollout], Tensor], None]
"""Called after each step with its metrics, its trajectories and their total rewards [S] (NaN: unrewarded)."""


OnStage = Callable[[str, int], None]
"""Called with a stage's name and the step before it begins."""


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
        ahead: gathers in another process, one step ahead, in place of `rollouts`; then `preview` and `prompts` are only
            told where that is.
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
        ahead: Ahead | None = None,
    ) -> None:
        self.config, self.learner = config, learner
        self.preview, self.ahead, self.on_step = preview, ahead, on_step
        self.credit = credit or credit_of(config, rewards)
        self.on_stage = on_stage
        self.step, self._time = 0, Stopwatch()
        self._gatherer = Gatherer(
            config,
            rollouts,
            prompts,
            rewards,
            self.credit,
            preview,
            stage=self._stage,
            sampling=learner.sampling,
            of_each_rank=learner.of_each_rank,
            sum_over_ranks=learner.all_reduce,
        )
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
        gathered = self._gathered()
        drawn = gathered.drawn
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
        metrics = self._metrics(gathered, credit, plan.keep_S, batches, learned)
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

    def _gathered(self) -> Gathered:
        """What this step is trained on. Collective."""
        if self.ahead is None:
            return self._gatherer.gather(self.step)
        with self._stage("wait"), self.learner.sampling() as policy:
            gathered = self.ahead.take(self.step, policy)
            if self.step + 1 < self.config.max_steps:
                self.ahead.ask(self.step + 1, policy, trained=self.step)
        return gathered

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
            masked=MaskedPlan(c.masked_logp, c.masked_steps, salt=self.step),
        )

    def _tokens_left(self, rollouts: Sequence[Rollout], keep_S: Tensor) -> int | None:
        """Of the trajectories that pruning left, where images are filled in."""
        if self.learner.policy.decoding_order == "raster":
            return None
        kept = (rollout for rollout, keep in zip(rollouts, keep_S.tolist(), strict=True) if keep)
        return sum(segment.num_sampled for rollout in kept for segment in rollout.segments)

    def _metrics(
        self,
        gathered: Gathered,
        credit: Credit,
        keep_S: Tensor,
        batches: Sequence[PackedBatch],
        learned: dict[str, float],
    ) -> StepMetrics:
        """Of the step, over all ranks. Collective."""
        c, drawn, waste = self.config, gathered.drawn, gathered.waste
        rollouts = drawn.rollouts
        seconds = split(self._time.seconds, rollout=drawn.stats.seconds, update=self.learner.seconds)
        num_kept, elapsed = sum(s.num_sampled for r in rollouts for s in r.segments), sum(seconds.values())
        num_sampled = num_kept + (0 if waste is None else waste.tokens)
        values = {**trl_names(learned), **self.learner.scoring}
        checks = c.replay_check_steps > 0 and self.step % c.replay_check_steps == 0
        if not checks or gathered.staleness:  # of older weights it would say how far training has moved them
            values.pop("rollout/replay_logp_max_abs", None)
        if checks and c.cfg_weight != 1.0:
            values |= of_guidance(rollouts)
        values |= {
            **of_rewards(drawn.table, credit.total_S, c.num_generations),
            "learning_rate": learning_rate(c, self.step),
            **of_rollouts(rollouts),
            **counted({"dgs/keep_fraction": float(keep_S.float().mean())}, keep_S.numel()),
            **of_savings(batches, drawn.stats, num_kept, self._tokens_left(rollouts, keep_S)),
            "num_tokens": float(num_sampled),
            "tokens_per_second": num_sampled / max(elapsed, 1e-9),
            "step_time": elapsed,
        }
        if waste is not None:
            values |= waste.metrics(credit.total_S, num_kept)
        values |= gathered.preview
        if self.ahead is not None:
            values |= {"rollout/staleness": float(gathered.staleness), **gathered.seconds}
        if gathered.broken is not None:
            self._failing.broken(gathered.broken)
        shown = sum(rollout.prompt.rewarded and not rollout.dropped for rollout in rollouts)
        ranks = self.learner.gathered(values | self._failing.told(drawn.table, shown) | of_logged(drawn.table))
        self._ended, logged = self._failing.heard(ranks), taken_logged(ranks)
        values = with_logged(merged(ranks), logged)
        return StepMetrics(step=self.step, values=values, seconds=seconds, extras=drawn.table.extras)
