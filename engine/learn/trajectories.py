"""The first half of a step: prompts -> trajectories -> rewards, with what is drawn anew and the preview's threshold.

The trainer does this itself; with `rollout_staleness` 1 a process beside it does, one step ahead (ahead.py).

Dims: S trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RewardError
from ..records import Prompt, Rollout
from ..rewards.ensemble import RewardSet
from ..rewards.hooks import state_of
from ..rewards.scoring import RewardTable, score
from ..rollout.preview_gate import PreviewGate
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling, truncation_of
from ..settings.train_config import TrainConfig
from .credit import CreditRule
from .refill import Drawn, Waste, refilled


class Prompts(Protocol):
    """An endless, resumable source of prompts."""

    def next_step(self) -> list[Prompt]: ...

    def more(self, wanted: Sequence[int]) -> list[Prompt] | None:
        """Others for the step under way, by ranks, as `PromptStream.more`; asked for by `refill`."""
        ...


class ResumablePrompts(Prompts, Protocol):
    """A source of prompts that can go on where it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(slots=True, kw_only=True)
class Gathered:
    """What a step is trained on."""

    drawn: Drawn
    waste: Waste | None = None
    """What `refill` gave up; None without it."""
    broken: RewardError | None = None
    """A reward function broke its contract: no trajectory of its round has a reward."""
    preview: dict[str, float] = field(default_factory=dict)
    """What the step's metrics tell of the preview."""
    prompts: list[Prompt] = field(default_factory=list)
    """All that were drawn for, in their order."""
    wanted: list[list[int]] = field(default_factory=list)
    """What the source was asked for beyond the step's own prompts (`Prompts.more`), round by round."""
    staleness: int = 0
    """How many steps were trained between the weights that sampled and those that are trained on it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What it took in another process, beside this step's own seconds."""


class Gatherer:
    """Gathers step after step.

    Args:
        config: settings of the run.
        rollouts: the sampler.
        prompts: of each step, this rank's share.
        rewards: reward functions.
        credit: what rewards make of a group; `refill` asks.
        preview: preview DGS; None draws every image to its end.
        stage: wraps a stage of the step, by name.
        sampling: within it the policy's weights are whole, and it is in eval mode.
        of_each_rank: a number of this rank -> that of each. Collective.
        sum_over_ranks: of a small tensor. Collective.
    """

    def __init__(
        self,
        config: TrainConfig,
        rollouts: RolloutEngine,
        prompts: Prompts,
        rewards: RewardSet,
        credit: CreditRule,
        preview: PreviewGate | None,
        *,
        stage: Callable[[str], AbstractContextManager[None]],
        sampling: Callable[[], AbstractContextManager[object]],
        of_each_rank: Callable[[int], list[int]] = lambda count: [count],
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.config, self.rollouts, self.prompts, self.rewards = config, rollouts, prompts, rewards
        self.credit, self.preview = credit, preview
        self._stage, self._sampling = stage, sampling
        self._of_each_rank, self._sum_over_ranks = of_each_rank, sum_over_ranks
        self._broken: RewardError | None = None

    def gather(self, step: int) -> Gathered:
        """What step `step` is trained on. Collective."""
        self._broken = None
        prompts, wanted, waste = list(self.prompts.next_step()), list[list[int]](), None
        drawn = self._draw(prompts, step)
        if self.config.refill:

            def more(numbers: Sequence[int]) -> list[Prompt] | None:
                wanted.append(list(numbers))
                added = self.prompts.more(numbers)
                prompts.extend(added or ())
                return added

            drawn, waste = refilled(
                drawn,
                self.config.refill,
                credit=self._credited,
                wanted_by_ranks=self._of_each_rank,
                more=more,
                draw=lambda added: self._draw(added, step),
                num_generations=self.config.num_generations,
            )
        told = {} if self.preview is None else self._adapted(self.preview)
        return Gathered(drawn=drawn, waste=waste, broken=self._broken, preview=told, prompts=prompts, wanted=wanted)

    def _credited(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        found = self.credit(drawn.table.values, drawn.rollouts)
        return found.total_S, found.tokens_S2

    def _draw(self, prompts: Sequence[Prompt], step: int) -> Drawn:
        """Trajectories of prompts, possibly none, and their rewards. Collective under ZeRO-3."""
        if self.preview is not None:
            self.preview.step = step
        with self._stage("rollout"), self._sampling():
            rollouts = self.rollouts.generate(prompts, sampling_of(self.config, step), self.preview)
        with self._stage("reward"):
            return Drawn(rollouts=rollouts, table=self._scored(rollouts, step), stats=self.rollouts.stats)

    def _scored(self, rollouts: Sequence[Rollout], step: int) -> RewardTable:
        """The rewards of the step; NaN all over where a function broke its contract, which ends the run after it."""
        try:
            state = state_of(self.config, step)
            functions, timeout = self.rewards.functions, self.config.reward_timeout
            return score(rollouts, functions, timeout=timeout, step=step + 1, state=state)
        except RewardError as error:
            self._broken, names = error, self.rewards.names
            return RewardTable(values=torch.full((len(rollouts), len(names)), math.nan), names=names)

    def _adapted(self, preview: PreviewGate) -> dict[str, float]:
        """One threshold for all ranks: each took its own from its first previews, and all count for the next move."""
        own = torch.tensor([preview.threshold or 0.0, float(preview.threshold is not None)], dtype=torch.float64)
        accepted, tried, total, known = self._sum_over_ranks(torch.cat([preview.counts, own])).tolist()
        told = {"rollout/preview_threshold": math.nan if preview.threshold is None else preview.threshold}
        preview.threshold = total / known if known else None
        return told | {"rollout/preview_acceptance": preview.adapt(int(accepted), int(tried))}


def sampling_of(config: TrainConfig, step: int) -> Sampling:
    """How the trajectories of a step are drawn."""
    return Sampling(
        num_generations=config.num_generations,
        temperature=config.temperature,
        image_temperature=config.image_temperature,
        max_text_tokens=config.max_completion_length,
        cfg_weight=config.cfg_weight,
        unconditional=config.unconditional,
        drawing_turn=config.drawing_turn,
        image_steps=config.image_steps,
        image_noise=config.image_noise,
        keep_proposals=config.masked_logp == "all",
        **truncation_of(config),
        seed=config.seed,
        step=step,
    )
