"""Group statistics in Triton: advantages and the keep decision, one program per group.

    A_s = (r_s - mean_g) / (std_g + eps), exactly 0 where the valid rewards of the group are equal but for rounding
    keep_s = rank_s < min_keep or (energy of the members ranked before s) < mass * (energy of the group)

Ranks come from comparing every pair of a group, in blocks of 32 members, so groups may have any
size. Statistics are float64, in a fixed order. `syncr1.kernels.reference.advantage` and `select` are the specification.

Dims: `S` sequences, `P` groups; in kernels `I` the members to decide on, `J` those they are compared with.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import SCALES
from ..reference.advantage import SPREAD
from ..reference.select import MASS_SLACK
from ..reference.select import dgs_select as select_on_host
from .launching import as_bytes, halves, on_device

MEMBERS = tl.constexpr(32)
DECIDED = tl.constexpr(8)
"""Members decided on at a time: a tile of pairs has 32 × 8, a few values for each thread."""
MASS_FACTOR = tl.constexpr(1 - MASS_SLACK)
SPREAD_SHARE = tl.constexpr(SPREAD)
SCALE_GROUP, SCALE_BATCH, SCALE_LOO = (tl.constexpr(SCALES.index(scale)) for scale in ("group", "batch", "loo"))
RULES = ("none", "variance_mass", "top_k")
"""Rules that need only one group at a time; the order is the code."""
RULE_NONE, RULE_MASS = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def valid_moments(reward_ptr, start, end):
    """(number, mean, sum of squared deviations, 1 where they differ) of the rewards that are not NaN."""
    lane = tl.arange(0, MEMBERS)
    count_I = tl.zeros([MEMBERS], tl.float64)
    total_I = tl.zeros([MEMBERS], tl.float64)
    highest_I = tl.full([MEMBERS], float("-inf"), tl.float64)
    lowest_I = tl.full([MEMBERS], float("inf"), tl.float64)
    for first in range(start, end, MEMBERS):
        reward_I = tl.load(reward_ptr + first + lane, mask=first + lane < end, other=float("nan"))
        valid_I = reward_I == reward_I
        count_I += tl.where(valid_I, 1.0, 0.0)
        total_I += tl.where(valid_I, reward_I, 0.0)
        highest_I = tl.maximum(highest_I, tl.where(valid_I, reward_I, float("-inf")))
        lowest_I = tl.minimum(lowest_I, tl.where(valid_I, reward_I, float("inf")))
    count = tl.sum(count_I)
    mean = tl.sum(total_I) / tl.maximum(count, 1.0)
    squares_I = tl.zeros([MEMBERS], tl.float64)
    for first in range(start, end, MEMBERS):
        reward_I = tl.load(reward_ptr + first + lane, mask=first + lane < end, other=float("nan"))
        centred_I = tl.where(reward_I == reward_I, reward_I - mean, 0.0)
        squares_I += centred_I * centred_I
    highest, lowest = tl.max(highest_I), tl.min(lowest_I)
    varies = highest - lowest > tl.maximum(tl.abs(highest), tl.abs(lowest)) * SPREAD_SHARE
    return count, mean, tl.sum(squares_I), varies


@triton.jit
def group_statistics(reward_ptr, start, end, deviation, eps, SCALE: tl.constexpr):
    """(mean, divisor) with an infinite divisor where the valid rewards are equal; `deviation` is that of the batch."""
    count, mean, squares, varies = valid_moments(reward_ptr, start, end)
    if SCALE == SCALE_GROUP:
        divisor = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + eps
    elif SCALE == SCALE_BATCH:
        divisor = deviation + eps
    elif SCALE == SCALE_LOO:
        divisor = (count - 1.0) / tl.maximum(count, 1.0)
    else:
        divisor = count * 0.0 + 1.0
    return mean, tl.where(varies, divisor, float("inf"))


@triton.jit
def member_advantages(reward_I, statistics):
    """float32; exactly 0 without a reward and in groups without variance."""
    # Plus 0: a deviation below the mean over infinity is -0.
    advantage_I = (reward_I - statistics[0]) / statistics[1] + 0.0
    return tl.where(reward_I == reward_I, advantage_I, 0.0).to(tl.float32)


@triton.jit
def member_scores(reward_ptr, energy_ptr, row_stride, index_I, inside_I, text, image, M: tl.constexpr):
    """(sum of squared advantages, combined reward, 1 where there is a reward), given or from the rewards of M rows."""
    reward_I = tl.load(reward_ptr + index_I, mask=inside_I, other=float("nan"))
    valid_I = reward_I == reward_I
    if energy_ptr is not None:
        energy_I = tl.load(energy_ptr + index_I, mask=inside_I, other=0.0)
    else:
        advantage_I = member_advantages(reward_I, text).to(tl.float64)
        energy_I = advantage_I * advantage_I
        if M == 2:
            other_I = tl.load(reward_ptr + row_stride + index_I, mask=inside_I, other=float("nan"))
            advantage_I = member_advantages(other_I, image).to(tl.float64)
            energy_I += advantage_I * advantage_I
            present_I = other_I == other_I
            reward_I = tl.where(valid_I, reward_I, 0.0) + tl.where(present_I, other_I, 0.0)
            valid_I = valid_I | present_I
    return tl.where(valid_I, energy_I, 0.0), tl.where(valid_I, reward_I, 0.0), valid_I


@triton.jit
def keep_members(
    reward_ptr,
    energy_ptr,
    row_stride,
    index_I,
    start,
    end,
    text,
    image,
    mass,
    keep_count,
    min_keep,
    M: tl.constexpr,
    RULE: tl.constexpr,
):
    """The rule's decision on members `index_I` of the group start..end: bool."""
    inside_I = index_I < end
    if RULE == RULE_NONE:
        return inside_I
    energy_I, reward_I, valid_I = member_scores(reward_ptr, energy_ptr, row_stride, index_I, inside_I, text, image, M)
    key_I = energy_I if RULE == RULE_MASS else reward_I
    rank_I = tl.zeros_like(index_I)
    held_I = tl.zeros_like(energy_I)
    sum_J = tl.zeros([MEMBERS], tl.float64)
    for first in range(start, end, MEMBERS):
        index_J = first + tl.arange(0, MEMBERS)
        energy_J, reward_J, valid_J = member_scores(
            reward_ptr, energy_ptr, row_stride, index_J, index_J < end, text, image, M
        )
        key_J = energy_J if RULE == RULE_MASS else reward_J
        tie_JI = (key_J[:, None] == key_I[None, :]) & (index_J[:, None] < index_I[None, :])
        before_JI = valid_J[:, None] & ((key_J[:, None] > key_I[None, :]) | tie_JI)
        rank_I += tl.sum(before_JI.to(rank_I.dtype), axis=0)
        held_I += tl.sum(tl.where(before_JI, energy_J[:, None], 0.0), axis=0)
        sum_J += energy_J
    energy = tl.sum(sum_J)
    if RULE == RULE_MASS:
        # The running sum just before a member decides, as in the sequential rule: it grows with the rank.
        chosen_I = (rank_I < tl.where(energy > 0, min_keep, 0)) | (held_I < mass * energy * MASS_FACTOR)
    else:
        wanted = tl.maximum(min_keep, tl.where(keep_count < 0, (end - start + 1) // 2, keep_count))
        chosen_I = rank_I < tl.where(energy > 0, wanted, 0)
    return inside_I & valid_I & chosen_I


@triton.jit
def deviation_kernel(reward_ptr, out_ptr, num_sequences):
    """Unbiased standard deviation of all valid rewards; one program."""
    count, _, squares, _ = valid_moments(reward_ptr, 0, num_sequences)
    tl.store(out_ptr, tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)))


@triton.jit
def advantage_kernel(reward_ptr, offsets_ptr, deviation_ptr, out_ptr, eps_high, eps_low, SCALE: tl.constexpr):
    """One program per group."""
    start = tl.load(offsets_ptr + tl.program_id(0))
    end = tl.load(offsets_ptr + tl.program_id(0) + 1)
    eps = tl.cast(eps_high, tl.float64) + tl.cast(eps_low, tl.float64)
    deviation = 0.0
    if deviation_ptr is not None:
        deviation = tl.load(deviation_ptr)
    statistics = group_statistics(reward_ptr, start, end, deviation, eps, SCALE)
    for first in range(start, end, MEMBERS):
        index_I = first + tl.arange(0, MEMBERS)
        reward_I = tl.load(reward_ptr + index_I, mask=index_I < end, other=float("nan"))
        tl.store(out_ptr + index_I, member_advantages(reward_I, statistics), mask=index_I < end)


@triton.jit(do_not_specialize=["keep_count", "min_keep"])
def keep_kernel(
    energy_ptr, reward_ptr, offsets_ptr, out_ptr, mass_high, mass_low, keep_count, min_keep, RULE: tl.constexpr
):
    """One program per group."""
    start = tl.load(offsets_ptr + tl.program_id(0))
    end = tl.load(offsets_ptr + tl.program_id(0) + 1)
    mass = tl.cast(mass_high, tl.float64) + tl.cast(mass_low, tl.float64)
    for first in range(start, end, DECIDED):
        index_I = first + tl.arange(0, DECIDED)
        keep_I = keep_members(
            reward_ptr, energy_ptr, 0, index_I, start, end, None, None, mass, keep_count, min_keep, 1, RULE
        )
        tl.store(out_ptr + index_I, keep_I.to(tl.uint8), mask=index_I < end)


def group_advantages(reward_S: Tensor, group_offsets: Tensor, scale: str, eps: float) -> Tensor:
    """[S] float64 combined rewards, NaN = none -> [S] float32."""
    out_S = torch.empty(reward_S.shape, dtype=torch.float32, device=reward_S.device)
    num_groups = group_offsets.numel() - 1
    if num_groups == 0:
        return out_S
    with on_device(reward_S):
        deviation = None
        if scale == "batch":
            deviation = torch.empty((), dtype=torch.float64, device=reward_S.device)
            deviation_kernel[(1,)](reward_S, deviation, reward_S.numel(), num_warps=1)
        code = SCALES.index(scale)
        advantage_kernel[(num_groups,)](reward_S, group_offsets, deviation, out_S, *halves(eps), code, num_warps=1)
    return out_S


def dgs_select(
    energy_S: Tensor,
    reward_S: Tensor,
    group_offsets: Tensor,
    *,
    rule: str,
    mass: float,
    keep: int | None,
    min_keep: int,
    seed: int,
) -> Tensor:
    """[S] float64 sums of squared advantages and [S] float64 rewards to rank by -> [S] bool."""
    if rule not in RULES:
        # max_variance and random read the rewards on the host: a synchronisation, and no CUDA graph.
        return select_on_host(
            energy_S, reward_S, group_offsets, rule=rule, mass=mass, keep=keep, min_keep=min_keep, seed=seed
        )
    keep_S = torch.empty(reward_S.shape, dtype=torch.bool, device=reward_S.device)
    num_groups = group_offsets.numel() - 1
    if num_groups > 0:
        counts = (-1 if keep is None else keep, min_keep)
        arguments = (energy_S, reward_S, group_offsets, as_bytes(keep_S), *halves(mass), *counts, RULES.index(rule))
        with on_device(reward_S):
            keep_kernel[(num_groups,)](*arguments, num_warps=1)
    return keep_S
