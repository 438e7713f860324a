"""Group statistics in C++. Dims: `S` sequences, `P` groups."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import RULES, SCALES
from .library import DOUBLE, INT, POINTER, function, pointer


def group_advantages(reward_S: Tensor, group_offsets: Tensor, scale: str, eps: float) -> Tensor:
    """[S] float64 rewards, NaN = none -> [S] float32."""
    call = function("syncr1_group_advantages", POINTER, POINTER, INT, INT, DOUBLE, POINTER)
    out_S = torch.empty(reward_S.numel(), dtype=torch.float32)
    call(pointer(reward_S), pointer(group_offsets), group_offsets.numel() - 1, SCALES.index(scale), eps, pointer(out_S))
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
    """[S] float64 sums of squared advantages and rewards -> [S] bool."""
    call = function("syncr1_dgs_select", *(POINTER,) * 3, INT, INT, DOUBLE, *(INT,) * 3, POINTER)
    out_S = torch.empty(reward_S.numel(), dtype=torch.bool)
    call(
        pointer(energy_S),
        pointer(reward_S),
        pointer(group_offsets),
        group_offsets.numel() - 1,
        RULES.index(rule),
        mass,
        -1 if keep is None else keep,
        min_keep,
        seed,
        pointer(out_S),
    )
    return out_S
