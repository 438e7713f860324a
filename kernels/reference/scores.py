"""Rewards → advantages and the keep decision, shared by the losses. Dims: `T` tokens, `S` sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from syncr1.kernels.layout import PackedLayout
from syncr1.kernels.options import LossOptions
from syncr1.kernels.records import MODALITIES
from syncr1.kernels.reference.advantage import group_advantages, groups_with_variance
from syncr1.kernels.reference.reduction import PackedTerms
from syncr1.kernels.reference.select import (
    advantage_energy,
    check_selection,
    per_modality,
    select_rows,
    total_reward,
)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What the rewards say about each sequence."""

    advantages: Tensor | dict[str, Tensor]
    """[S], or one [S] per modality."""
    keep: Tensor
    """[S] bool."""
    frac_reward_zero_std: Tensor
    """Scalar in [0, 1]: groups whose rewards are all equal, in every modality."""

    def per_token(self, terms: PackedTerms) -> Tensor:
        """[T]: the advantage of the token's sequence, from the rewards of the token's own modality."""
        if isinstance(self.advantages, Tensor):
            return self.advantages[terms.sequence_T]
        text_T, image_T = (self.advantages[m][terms.sequence_T] for m in MODALITIES)
        return torch.where(terms.image_T, image_T, text_T)


def score_rewards(
    op: str,
    rewards: Tensor | Mapping[str, Tensor],
    layout: PackedLayout,
    settings: LossOptions,
    weights: Tensor | None,
) -> Scores:
    """Advantages from all members of each group, then the keep decision from those advantages."""
    check_selection(op, settings.dgs, settings.dgs_mass, settings.dgs_keep, settings.dgs_min_keep)
    parts = per_modality(op, rewards)
    offsets = layout.group_offsets
    advantages = [
        group_advantages(
            part, offsets, weights=weights, scale=settings.scale, eps=settings.eps, aggregate=settings.aggregate
        )
        for part in parts
    ]
    keep = select_rows(
        advantage_energy(advantages),
        total_reward(parts, weights),
        offsets,
        rule=settings.dgs,
        mass=settings.dgs_mass,
        keep=settings.dgs_keep,
        min_keep=settings.dgs_min_keep,
        seed=settings.dgs_seed,
    )
    varies_P = torch.stack([groups_with_variance(total_reward([part], weights), offsets) for part in parts]).any(dim=0)
    num_groups = max(offsets.numel() - 1, 1)
    named: dict[str, Tensor] = dict(zip(MODALITIES, advantages, strict=False))
    return Scores(advantages[0] if len(advantages) == 1 else named, keep, (~varies_P).sum() / num_groups)
