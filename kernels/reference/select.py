"""Dynamic Group Scaling: which trajectories of each group are trained on.

    variance_mass   the smallest set with Σ A² ≥ mass · Σ_group A², taken in the order of |A|
    max_variance    the `keep` trajectories whose rewards have the greatest variance (PODS, arXiv 2504.13818)
    top_k           the `keep` best (GFPO, arXiv 2508.09726)
    random          as many as variance_mass, drawn at random: the baseline of ablations

Ties go to the lower index. Dims: `S` sequences, `P` groups.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .philox import uniform

RANDOM_STREAM = 1
"""Philox stream of the rule `random`; 0 is the sampler's."""
MASS_SLACK = 1e-9
"""Relative: rounding of the running sum must not cost a group one more trajectory."""


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
    """The rule on Σ A² and the combined reward of each trajectory: [S] bool."""
    if rule == "none":
        return torch.ones_like(reward_S, dtype=torch.bool)
    energy, reward, bounds = energy_S.tolist(), reward_S.tolist(), group_offsets.tolist()
    draw = uniform(seed, torch.arange(len(energy)), RANDOM_STREAM).tolist() if rule == "random" else []
    kept: list[int] = []
    for start, end in pairwise(bounds):
        valid = [s for s in range(start, end) if not math.isnan(reward[s])]
        if not any(energy[s] > 0 for s in valid):
            continue
        if rule in ("variance_mass", "random"):
            chosen = _variance_mass(valid, energy, mass, min_keep)
            if rule == "random":
                chosen = sorted(valid, key=lambda s: draw[s])[: len(chosen)]
        else:
            num_kept = max(min_keep, math.ceil((end - start) / 2) if keep is None else keep)
            ranked = sorted(valid, key=lambda s: -reward[s])
            chosen = _max_variance(ranked, reward, num_kept) if rule == "max_variance" else ranked[:num_kept]
        kept += chosen
    keep_S = torch.zeros(len(energy), dtype=torch.bool)
    keep_S[torch.tensor(kept, dtype=torch.int64)] = True
    return keep_S.to(reward_S.device)


def _variance_mass(valid: list[int], energy: list[float], mass: float, min_keep: int) -> list[int]:
    ranked = sorted(valid, key=lambda s: -energy[s])
    wanted = mass * sum(energy[s] for s in ranked) * (1 - MASS_SLACK)
    held, num_kept = 0.0, 0
    while num_kept < len(ranked) and held < wanted:
        held += energy[ranked[num_kept]]
        num_kept += 1
    return ranked[: max(num_kept, min_keep)]


def _max_variance(ranked: list[int], reward: list[float], num_kept: int) -> list[int]:
    """The best subset is always some of the highest with some of the lowest; more of the highest wins a tie."""
    size = min(num_kept, len(ranked))
    best, best_variance = ranked[:size], -1.0
    for num_high in range(size, -1, -1):
        subset = ranked[:num_high] + ranked[len(ranked) - (size - num_high) :]
        mean = sum(reward[s] for s in subset) / size
        variance = sum((reward[s] - mean) ** 2 for s in subset) / size
        if variance > best_variance * (1 + MASS_SLACK):
            best, best_variance = subset, variance
    return best
