"""Rewards -> what each token answers for.

Dims: S trajectories, G members of a group, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from syncr1.kernels.api import group_advantages

from ..records import Rollout
from ..rewards.ensemble import RewardSet, combine

Scale = Literal["group", "batch", "none", "loo"]


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


def shared_advantages(
    values_SK: Tensor, rollouts: Sequence[Rollout], rewards: RewardSet, scale: Scale, text_weight: float
) -> Tensor:
    """Each half's own advantage, summed over the halves of a sample: [S, 2] float32, both columns alike; NaN = none.

        A = A_drawing + lambda A_answer        in place of the advantage of R_drawing + lambda R_answer

    The released code's `unify_advantage`.  The loss must take it as it is: `scale="none"`.

    Args:
        values_SK: every half's own rewards; NaN = none.
        rollouts: S, members of a group adjacent.
        rewards: for the weights.
        scale: of each half's advantages, as `group_advantages` takes it.
        text_weight: lambda.
    """
    total_S = combine(values_SK, rewards.weight_tensor())
    names = [rollout.prompt.id for rollout in rollouts]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    offsets = torch.tensor([*starts, len(names)], dtype=torch.int32)
    own_S = group_advantages(total_S, offsets, scale=scale)
    own_S = torch.where(total_S.isnan(), total_S, own_S)
    weights = torch.tensor([text_weight if "text" in r.prompt.segments else 1.0 for r in rollouts])
    halves = shared_within_samples(_columns(own_S * weights, rollouts), rollouts)
    return combine(halves, torch.ones(2))[:, None].expand(-1, 2).contiguous()


def _columns(values_S: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """[S, 2]: the answers' values in the first column, the drawings' in the second, NaN elsewhere."""
    answers = torch.tensor(["text" in rollout.prompt.segments for rollout in rollouts])
    nothing = torch.full_like(values_S, math.nan)
    return torch.stack([torch.where(answers, values_S, nothing), torch.where(answers, nothing, values_S)], dim=1)


def credited_rewards(values_SK: Tensor, rewards: RewardSet, credit: str) -> Tensor:
    """What text tokens and image tokens of each trajectory answer for: [S, 2] float32; NaN = nothing.

    `shared` and `image_only`: both columns are the weighted sum of all rewards. `per_segment`: each column sums the
    rewards that judge its own segment.
    """
    weights = rewards.weight_tensor()
    if credit != "per_segment":
        return combine(values_SK, weights)[:, None].expand(-1, 2).contiguous()
    columns = []
    for kind in ("text", "image"):
        own = [k for k, name in enumerate(rewards.kinds) if name == kind]
        empty = torch.full((values_SK.shape[0],), math.nan)
        columns.append(combine(values_SK[:, own], weights[own]) if own else empty)
    return torch.stack(columns, dim=1)
