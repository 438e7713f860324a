"""Group-relative advantages.

    A_s = (r_s − mean_g) / (std_g + eps),   exactly 0 where the valid rewards of the group are equal but for rounding

Source: GRPO (arXiv 2402.03300, Eq. 3); "loo" RLOO (arXiv 2402.14740); "none" Dr. GRPO (arXiv 2503.20783);
"normalize_then_sum" GDPO (arXiv 2601.05242). Statistics are float64.

Dims: `S` sequences, `P` groups, `K` rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import segment_ids
from .segments import reduce_segments, sum_segments


def combine_rewards(rewards: Tensor, weights: Tensor | None) -> Tensor:
    """[S] or [S, K] → [S] float64: the weighted sum of the rewards present, NaN where none is."""
    if rewards.dim() == 1:
        return rewards.double()
    reward_SK = rewards.double()
    if weights is not None:
        reward_SK = reward_SK * weights.to(reward_SK)
    missing_S = torch.isnan(reward_SK).all(dim=1)
    return reward_SK.nansum(dim=1).masked_fill(missing_S, torch.nan)


SPREAD = 2.0**-21
"""Relative: four units in the last place of float32, in which rewards are computed, whatever holds them afterwards. A
spread up to this is rounding and would become an advantage of any size; a small one above it is a signal."""


def groups_with_variance(reward_S: Tensor, group_offsets: Tensor) -> Tensor:
    """[P] bool: the valid rewards differ by more than SPREAD of the largest of them."""
    highest_P = reduce_segments(reward_S.nan_to_num(nan=-torch.inf), group_offsets, "max", -torch.inf)
    lowest_P = reduce_segments(reward_S.nan_to_num(nan=torch.inf), group_offsets, "min", torch.inf)
    return highest_P - lowest_P > SPREAD * torch.maximum(highest_P.abs(), lowest_P.abs())


def standardize(reward_S: Tensor, group_offsets: Tensor, scale: str, eps: float) -> Tensor:
    """[S] float64 rewards → [S] float64 advantages."""
    num_sequences = reward_S.numel()
    group_S = segment_ids(group_offsets, num_sequences)
    valid_S = ~torch.isnan(reward_S)
    value_S = reward_S.nan_to_num(nan=0.0)
    count_P = sum_segments(valid_S.double(), group_offsets)
    mean_P = sum_segments(value_S, group_offsets) / count_P.clamp_min(1)
    used_S = valid_S & groups_with_variance(reward_S, group_offsets)[group_S]
    centred_S = torch.where(used_S, value_S - mean_P[group_S], 0.0)
    divisor_S = torch.ones_like(centred_S)
    if scale == "loo":
        divisor_S = ((count_P - 1) / count_P.clamp_min(1))[group_S]
    elif scale == "batch":
        divisor_S = divisor_S * (_batch_std(value_S, valid_S) + eps)
    elif scale == "group":
        variance_P = sum_segments(centred_S.square(), group_offsets) / (count_P - 1).clamp_min(1)
        divisor_S = (variance_P.sqrt() + eps)[group_S]
    return torch.where(used_S, centred_S / divisor_S, 0.0)


def _batch_std(value_S: Tensor, valid_S: Tensor) -> Tensor:
    """Unbiased standard deviation of the valid values; scalar."""
    count = valid_S.sum()
    mean = torch.where(valid_S, value_S, 0.0).sum() / count.clamp_min(1)
    squares = torch.where(valid_S, value_S - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp_min(1)).sqrt()


def combine_advantages(
    rewards: Tensor, group_offsets: Tensor, weights: Tensor | None, scale: str, eps: float
) -> Tensor:
    """ "normalize_then_sum": each reward is normalised in its group, the weighted sum over the batch: [S] float64."""
    columns = [standardize(column.double(), group_offsets, scale, eps) for column in rewards.unbind(dim=1)]
    advantage_SK = torch.stack(columns, dim=1).masked_fill(torch.isnan(rewards), torch.nan)
    total_S = combine_rewards(advantage_SK, weights)
    valid_S = ~torch.isnan(total_S)
    value_S = total_S.nan_to_num(nan=0.0)
    mean = value_S.sum() / valid_S.sum().clamp_min(1)
    # Groups without variance in any reward stay at exactly 0, whatever the batch mean is.
    varies_P = torch.stack([groups_with_variance(c.double(), group_offsets) for c in rewards.unbind(dim=1)]).any(dim=0)
    used_S = valid_S & varies_P[segment_ids(group_offsets, value_S.numel())]
    centred_S = torch.where(used_S, value_S - mean, 0.0)
    if centred_S.numel():  # rewards that cancel each other leave rounding
        largest = advantage_SK.nan_to_num(nan=0.0).abs().max() * (1.0 if weights is None else weights.abs().max())
        centred_S = torch.where(centred_S.abs().max() > SPREAD * largest, centred_S, 0.0)
    return torch.where(centred_S != 0, centred_S / (_batch_std(value_S, valid_S) + eps), 0.0)
