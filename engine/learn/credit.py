"""Rewards -> credit -> the step's plan: what each reward said becomes what each token answers for, and then advantages
and who is trained on.

A rule and `plan_of` are called once a step; metrics, packing and the loss read what they give.

Dims: S trajectories, G members of a group, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from syncr1.kernels.api import group_advantages, grpo_plan

from ..records import MODALITY_NAMES, Rollout
from ..rewards.ensemble import RewardSet, combine
from ..settings.train_config import TrainConfig

Scale = Literal["group", "batch", "none", "loo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What a step's trajectories earned."""

    total_S: Tensor
    """[S] float32: the weighted sum of its rewards, with those that its sample shares; NaN = unrewarded."""
    tokens_S2: Tensor
    """[S, 2] float32: what its text and its image tokens answer for; NaN = nothing."""
    scale: Scale | None = None
    """What their advantages are divided by; None: as `scale_rewards` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What the step's credit decides before any forward."""

    advantages_S2: Tensor
    """[S, 2] float32: of its text and its image tokens, as `PackedBatch.advantages`."""
    keep_S: Tensor
    """[S] bool: who is trained on."""


CreditRule = Callable[[Tensor, Sequence[Rollout]], Credit]
"""Values of the rewards [S, K] (NaN = no reward) and trajectories, members of a group adjacent -> their credit."""


def credited_rewards(values_SK: Tensor, rollouts: Sequence[Rollout], rewards: RewardSet, credit: str) -> Credit:
    """Tokens answer for rewards, of which the prompts of a sample share theirs.

    `shared` and `image_only`: all for the weighted sum of all rewards. `per_segment`: each modality for the weighted
    sum of the rewards that judge its segment.
    """
    shared_SK, weights = shared_within_samples(values_SK, rollouts), rewards.weight_tensor()
    total_S = combine(shared_SK, weights)
    if credit != "per_segment":
        return Credit(total_S=total_S, tokens_S2=_alike(total_S))
    columns = []
    for kind in MODALITY_NAMES:
        own = [k for k, name in enumerate(rewards.kinds) if name == kind]
        columns.append(combine(shared_SK[:, own], weights[own]) if own else torch.full_like(total_S, math.nan))
    return Credit(total_S=total_S, tokens_S2=torch.stack(columns, dim=1))


def credit_of(config: TrainConfig, rewards: RewardSet) -> CreditRule:
    """The rule that the settings name."""
    return partial(credited_rewards, rewards=rewards, credit=config.credit)


def shared_advantages(
    values_SK: Tensor, rollouts: Sequence[Rollout], rewards: RewardSet, scale: Scale, text_weight: float
) -> Credit:
    """Tokens answer for each half's own advantage, summed over the halves of a sample.

        A = A_drawing + lambda A_answer        in place of the advantage of R_drawing + lambda R_answer

    The released code's `unify_advantage`: what comes out is divided no more.

    Args:
        values_SK, rollouts: as any rule takes them.
        rewards: for the weights.
        scale: of each half's advantages, as `group_advantages` takes it.
        text_weight: lambda.
    """
    own_S = combine(values_SK, rewards.weight_tensor())
    names = [rollout.prompt.id for rollout in rollouts]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    offsets = torch.tensor([*starts, len(names)], dtype=torch.int32)
    advantages_S = torch.where(own_S.isnan(), own_S, group_advantages(own_S, offsets, scale=scale))
    answers_S = torch.tensor(["text" in rollout.prompt.segments for rollout in rollouts])
    weighted_S = advantages_S * torch.where(answers_S, text_weight, 1.0)
    halves_S2 = torch.stack(
        [weighted_S.masked_fill(~answers_S, math.nan), weighted_S.masked_fill(answers_S, math.nan)], 1
    )
    return Credit(
        total_S=combine(shared_within_samples(values_SK, rollouts), rewards.weight_tensor()),
        tokens_S2=_alike(combine(shared_within_samples(halves_S2, rollouts), torch.ones(2))),
        scale="none",
    )


def plan_of(
    credit: Credit,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    *,
    step: int,
    holds_anchors: bool,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> StepPlan:
    """Advantages of the step's trajectories and which of them are trained on: the DGS rule, no trajectory that was
    dropped, and all or none of the anchors.

    Args:
        credit: of all trajectories.
        rollouts: S, members of a group adjacent.
        config: scale_rewards, credit and the DGS rule.
        step: seeds the rule `random`.
        holds_anchors: a KL term acts on anchors, so that all of them are kept.
        sum_over_ranks: sums a small tensor over ranks, for `scale_rewards="batch"`. Collective then.
    """
    tokens_S2, scale = credit.tokens_S2, credit.scale or config.scale_rewards
    if scale == "batch":
        tokens_S2, scale = over_deviation(tokens_S2, sum_over_ranks), "none"
    columns = [column.contiguous() for column in tokens_S2.unbind(1)]
    plan = grpo_plan(
        dict(zip(MODALITY_NAMES, columns, strict=True)) if config.credit == "per_segment" else columns[0],
        torch.arange(0, len(rollouts) + 1, config.num_generations, dtype=torch.int32),
        scale=scale,
        dgs=config.dgs,
        dgs_mass=config.dgs_mass,
        dgs_keep=config.dgs_keep,
        dgs_seed=config.seed * 100_003 + step,
    )
    made = plan.advantages
    anchors = torch.tensor([not rollout.prompt.rewarded for rollout in rollouts])
    finished = torch.tensor([not rollout.dropped for rollout in rollouts])
    return StepPlan(
        advantages_S2=_alike(made) if isinstance(made, Tensor) else torch.stack([made[n] for n in MODALITY_NAMES], 1),
        keep_S=(plan.keep | anchors if holds_anchors else plan.keep & ~anchors) & finished,
    )


def shared_within_samples(values_SK: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """Member i of each prompt of a sample gets the rewards of member i of the sample's other prompts: [S, K].

    CoRL's first stage pairs the i-th drawing with the i-th answer of one sample, and the pair earns one reward: what a
    half has no reward of its own for, it takes from the other half.  A pair that lacks a reward which other pairs of
    the sample have gets NaN in every column, as a trajectory of a group would.  Prompts without a `sample` keep theirs.

    Args:
        values_SK: float32; NaN = no reward.
        rollouts: S, in the order of the rows.
    """
    samples: dict[str, dict[int, list[int]]] = {}
    for row, rollout in enumerate(rollouts):
        if rollout.prompt.sample is not None:
            samples.setdefault(rollout.prompt.sample, {}).setdefault(rollout.member, []).append(row)
    shared = values_SK.clone()
    for pairs in samples.values():
        if all(len(rows) == 1 for rows in pairs.values()):
            continue
        merged = {member: values_SK[rows].nanmean(0) for member, rows in pairs.items()}
        applies = ~torch.stack(list(merged.values())).isnan().all(0)
        for member, rows in pairs.items():
            lacks_one = bool((applies & merged[member].isnan()).any())
            shared[rows] = torch.full_like(merged[member], math.nan) if lacks_one else merged[member]
    return shared


def over_deviation(tokens_S2: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """[S, 2] credit divided by the standard deviation of all of the step's, over ranks, which no micro-batch knows."""
    valid, values = ~tokens_S2.isnan(), tokens_S2.nan_to_num(nan=0.0).double()
    count, total, squares = sum_over_ranks(torch.stack([valid.double().sum(0), values.sum(0), values.square().sum(0)]))
    variance = (squares - total.square() / count.clamp(min=1)).clamp(min=0) / (count - 1).clamp(min=1)
    return tokens_S2 / (variance.sqrt() + 1e-4).float()


def _alike(values_S: Tensor) -> Tensor:
    """[S, 2]: text and image tokens answer for the same."""
    return values_S[:, None].expand(-1, 2).contiguous()
