"""DAPO's dynamic sampling: what teaches nothing is given up for new prompts, before anything is computed for it.

A group whose members all earned the same has no advantage.  Its sample (the group itself, or CoRL's drawing and answer
where neither half has any) is replaced by the next one of the source, drawn and rewarded like the first, for a number
of rounds at most; what is without variance then is trained as it always is.  Anchors stay, and so does a group of which
nothing is known because its rewards failed.

All ranks go through as many rounds as the one that needs most, with nothing to draw where they have enough, so that
collectives match.  A step has no prompt twice: random numbers are keyed by step and prompt, and the source's own state
holds what is drawn, so that a resumed run goes the same way.

Source: DAPO (arXiv 2503.14476), dynamic sampling.  Dims: S trajectories, G members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from syncr1.kernels.reference.advantage import groups_with_variance

from ..records import Prompt, Rollout
from ..rewards.scoring import RewardTable
from ..rollout.sampling import RolloutStats, added
from .metrics import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Trajectories with their rewards, groups adjacent, those of a sample one behind the other."""

    rollouts: Sequence[Rollout]
    table: RewardTable
    stats: RolloutStats
    """What drawing them cost, those that were given up included."""

    def with_only(self, rows: Sequence[int]) -> Drawn:
        table = self.table.of_rows(rows)
        return Drawn(rollouts=[self.rollouts[i] for i in rows], table=table, stats=self.stats)

    def and_then(self, later: Drawn) -> Drawn:
        return Drawn(
            rollouts=[*self.rollouts, *later.rollouts],
            table=self.table.and_then(later.table),
            stats=added(self.stats, later.stats),
        )


@dataclass(slots=True)
class Waste:
    """What was drawn and given up on this rank."""

    rounds: int = 0
    groups: int = 0
    tokens: int = 0
    totals: list[Tensor] = field(default_factory=list)
    """Total rewards [·] of what was given up."""

    def metrics(self, kept_S: Tensor, num_kept: int) -> dict[str, float]:
        """Args: total rewards of the trajectories that stayed, NaN = unrewarded, and how many tokens those have."""
        everything = torch.cat([kept_S, *self.totals])
        known, drawn = everything[~everything.isnan()], self.tokens + num_kept
        return {
            "refill/rounds": float(self.rounds),
            "refill/groups_discarded": float(self.groups),
            **counted({"refill/tokens_wasted_fraction": self.tokens / max(1, drawn)}, drawn),
            # The mean over what the policy drew: of what is left, `reward` is no fair picture.
            **counted({"refill/reward_of_all": float(known.mean())}, known.numel()),
        }


def refilled(
    drawn: Drawn,
    rounds: int,
    *,
    credit: Callable[[Drawn], tuple[Tensor, Tensor]],
    wanted_by_ranks: Callable[[int], list[int]],
    more: Callable[[Sequence[int]], list[Prompt] | None],
    draw: Callable[[Sequence[Prompt]], Drawn],
    num_generations: int,
) -> tuple[Drawn, Waste]:
    """Replaces what teaches nothing, round after round. Collective.

    Args:
        drawn: of this rank.
        rounds: at most so many.
        credit: total rewards [S] and what tokens answer for, [S, 2]; NaN = nothing.
        wanted_by_ranks: this rank's number of samples to replace -> that of each rank.
        more: those numbers -> this rank's new prompts; None when the source has no others for anybody.
        draw: samples and rewards prompts; every rank calls it as often.
        num_generations: G.
    """
    waste = Waste()
    for _ in range(rounds):
        total_S, tokens_S2 = credit(drawn)
        samples = rows_by_sample(drawn.rollouts)
        idle = [rows for rows in samples if teaches_nothing(tokens_S2[rows], num_generations)]
        wanted = wanted_by_ranks(len(idle))
        prompts = more(wanted) if any(wanted) else None
        if prompts is None:
            break
        given_up = [row for rows in idle[: num_samples(prompts)] for row in rows]
        waste.rounds += 1
        waste.groups += len(given_up) // num_generations
        waste.tokens += sum(segment.num_sampled for i in given_up for segment in drawn.rollouts[i].segments)
        waste.totals.append(total_S[given_up])
        dropped = set(given_up)
        stays = [row for row in range(len(drawn.rollouts)) if row not in dropped]
        drawn = drawn.with_only(stays).and_then(draw(prompts))
    return drawn, waste


def _sample_of(prompt: Prompt) -> str:
    return prompt.id if prompt.sample is None else f"sample {prompt.sample}"


def rows_by_sample(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The rows of each sample, which are neighbours."""
    keyed = groupby(range(len(rollouts)), key=lambda row: _sample_of(rollouts[row].prompt))
    return [list(rows) for _, rows in keyed]


def num_samples(prompts: Sequence[Prompt]) -> int:
    return len({_sample_of(prompt) for prompt in prompts})


def teaches_nothing(tokens_S2: Tensor, num_generations: int) -> bool:
    """Whether no token of a sample has an advantage, although its rewards are known.

    Args:
        tokens_S2: what text and image tokens of its trajectories answer for; NaN = nothing.
        num_generations: G.
    """
    offsets = torch.arange(0, tokens_S2.shape[0] + 1, num_generations)
    columns = tokens_S2.double().unbind(1)
    if any(bool(groups_with_variance(column, offsets).any()) for column in columns):
        return False
    known = (~tokens_S2.isnan()).view(-1, num_generations, 2).sum(1)
    return bool((known > 1).any())
