"""Registered ops `syncr1::group_advantages` and `syncr1::dgs_select`: no gradient, every backend.

Dims: `S` sequences, `P` groups, `K` rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_rewards
from ..dispatch import module_of
from ..plan import advantage_energy, advantages_of, total_reward
from .register import fakes, implements


@implements(
    "group_advantages",
    (
        "(Tensor rewards, Tensor group_offsets, Tensor? weights, str scale, float eps, str aggregate, str backend)"
        " -> Tensor"
    ),
)
def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    weights: Tensor | None,
    scale: str,
    eps: float,
    aggregate: str,
    backend: str,
) -> Tensor:
    """[S] float32, or float64 for float64 rewards."""
    check_rewards("group_advantages", rewards, group_offsets, weights)
    advantages_S = advantages_of(module_of(backend), rewards, group_offsets, weights, scale, eps, aggregate)
    return advantages_S.to(_dtype(rewards))


@fakes("group_advantages")
def _(
    rewards: Tensor, group_offsets: Tensor, weights: Tensor | None, scale: str, eps: float, aggregate: str, backend: str
) -> Tensor:
    return rewards.new_empty(rewards.shape[:1], dtype=_dtype(rewards))


def _dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


@implements(
    "dgs_select",
    (
        "(Tensor[] rewards, Tensor group_offsets, Tensor? weights, str scale, float eps, str aggregate, str rule,"
        " float mass, int? keep, int min_keep, int seed, str backend) -> Tensor"
    ),
    reads_back=True,  # of the rules max_variance and random, the rewards
)
def dgs_select(
    rewards: Sequence[Tensor],
    group_offsets: Tensor,
    weights: Tensor | None,
    scale: str,
    eps: float,
    aggregate: str,
    rule: str,
    mass: float,
    keep: int | None,
    min_keep: int,
    seed: int,
    backend: str,
) -> Tensor:
    """[S] bool; one reward tensor, or those of text and image."""
    for part in rewards:
        check_rewards("dgs_select", part, group_offsets, weights)
    module, offsets = module_of(backend), group_offsets.long().contiguous()
    how = (weights, scale, eps, aggregate)
    advantages_MS = torch.stack([advantages_of(module, part, offsets, *how) for part in rewards])
    energy_S, reward_S = advantage_energy(advantages_MS), total_reward(rewards, weights).contiguous()
    selected: Tensor = module.dgs_select(
        energy_S, reward_S, offsets, rule=rule, mass=mass, keep=keep, min_keep=min_keep, seed=seed
    )
    return selected


@fakes("dgs_select")
def _(
    rewards: Sequence[Tensor],
    group_offsets: Tensor,
    weights: Tensor | None,
    scale: str,
    eps: float,
    aggregate: str,
    rule: str,
    mass: float,
    keep: int | None,
    min_keep: int,
    seed: int,
    backend: str,
) -> Tensor:
    return rewards[0].new_empty(rewards[0].shape[:1], dtype=torch.bool)
