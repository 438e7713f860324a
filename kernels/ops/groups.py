"""`group_advantages` and `dgs_select`: no gradient, every backend. Dims: `S` sequences, `P` groups, `K` rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_float, check_rewards
from ..dispatch import choose, module_of, same_device
from ..options import Aggregate, Rule, Scale, check_selection, check_statistics
from ..plan import Rewards, advantage_energy, advantages_of, per_modality, total_reward
from ..register import fakes, implements, registered


class AdvantageInputs(NamedTuple):
    """What `group_advantages` is given: arguments of the registered op."""

    rewards: Tensor
    """[S] or [S, K]."""
    group_offsets: Tensor
    """[P+1]."""
    weights: Tensor | None
    """[K]."""
    scale: str
    eps: float
    aggregate: str
    backend: str


class SelectionInputs(NamedTuple):
    """What `dgs_select` is given: arguments of the registered op."""

    rewards: Sequence[Tensor]
    """One, or those of text and image."""
    group_offsets: Tensor
    weights: Tensor | None
    scale: str
    eps: float
    aggregate: str
    rule: str
    mass: float
    keep: int | None
    min_keep: int
    seed: int
    backend: str


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    *,
    weights: Tensor | None = None,
    scale: Scale = "group",
    eps: float = 1e-4,
    aggregate: Aggregate = "sum_then_normalize",
    backend: str | None = None,
) -> Tensor:
    """Advantage of each sequence relative to its group.

    Equivalent PyTorch, for one group without NaN:
        r = (rewards * weights).sum(1)
        A = (r - r.mean()) / (r.std() + eps) if r.max() - r.min() > 2**-21 * r.abs().max() else torch.zeros_like(r)

    Args:
        rewards: [S] or [S, K] float, finite; NaN = no reward. NaN components are left out of the weighted sum; a
            sequence without any is left out of the statistics and gets 0.
        group_offsets: [P+1] int; group p is sequences `group_offsets[p]:group_offsets[p+1]`, of any size.
        weights: [K] float, finite, or None (all 1); only with [S, K].
        scale: "group" divides by std_group + eps (unbiased), "batch" by std of all rewards + eps, "none" only centres,
            "loo" subtracts the mean of the *other* members.
        eps: finite, ≥ 0, in units of the reward.
        aggregate: "sum_then_normalize", or "normalize_then_sum": each reward is normalised in its group, the weighted
            sum is normalised over the batch (GDPO).
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        [S] float32 (float64 for float64 rewards), no gradient; exactly 0 where a group's valid rewards are all equal
        up to four units in the last place of float32 (2⁻²¹ of the largest).

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: GRPO (arXiv 2402.03300); RLOO (2402.14740); Dr. GRPO (2503.20783); GDPO (2601.05242).
    """
    op = "group_advantages"
    check_statistics(op, scale, eps, aggregate)
    check_float(op, "rewards", rewards)
    same_device(op, rewards=rewards, group_offsets=group_offsets, weights=weights)
    chosen = choose(op, backend, rewards)
    inputs = AdvantageInputs(rewards.detach(), group_offsets, weights, scale, float(eps), aggregate, chosen)
    advantages_S: Tensor = registered.group_advantages(*inputs)
    return advantages_S


@implements("group_advantages", AdvantageInputs, "Tensor")
def score(inputs: AdvantageInputs) -> Tensor:
    """[S] float32, or float64 for float64 rewards."""
    rewards, group_offsets, weights, scale, eps, aggregate, backend = inputs
    check_rewards("group_advantages", rewards, group_offsets, weights)
    advantages_S = advantages_of(module_of(backend), rewards, group_offsets, weights, scale, eps, aggregate)
    return advantages_S.to(_dtype(rewards))


@fakes("group_advantages", AdvantageInputs)
def _(inputs: AdvantageInputs) -> Tensor:
    return inputs.rewards.new_empty(inputs.rewards.shape[:1], dtype=_dtype(inputs.rewards))


def _dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def dgs_select(
    rewards: Rewards,
    group_offsets: Tensor,
    *,
    rule: Rule = "variance_mass",
    mass: float = 0.9,
    keep: int | None = None,
    min_keep: int = 2,
    seed: int = 0,
    weights: Tensor | None = None,
    scale: Scale = "group",
    eps: float = 1e-4,
    aggregate: Aggregate = "sum_then_normalize",
    backend: str | None = None,
) -> Tensor:
    """Which trajectories of each group are trained on (Dynamic Group Scaling).

    Equivalent PyTorch, for rule "variance_mass" and one group:
        energy, order = group_advantages(rewards, offsets).square().sort(descending=True, stable=True)
        size = int((energy.cumsum(0) < mass * energy.sum()).sum()) + 1
        keep = torch.zeros_like(rewards, dtype=torch.bool); keep[order[:max(size, min_keep)]] = True

    Args:
        rewards: as in `group_advantages`, or {"text": …, "image": …}: then |A| is sqrt(A_text² + A_image²), and top_k
            and max_variance rank by the sum of both rewards.
        group_offsets: [P+1] int.
        rule: "variance_mass" keeps the smallest set with at least `mass` of Σ A²; "max_variance" the `keep`
            trajectories of greatest reward variance (PODS); "top_k" the `keep` best (GFPO); "random" as many as
            variance_mass, drawn by `seed`; "none" everything.
        mass: in (0, 1], met to a relative 1e-9.
        keep: ≥ 1 per group; None = half of the group, rounded up. For max_variance and top_k.
        min_keep: ≥ 0; lower bound per group with variance. Groups without variance keep nothing (except under "none").
        seed: of the rule "random".
        weights, scale, eps, aggregate: of the advantages.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        [S] bool. Ties go to the lower index; sequences without a reward are never kept (except under "none").

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: PODS (arXiv 2504.13818); GFPO (2508.09726).
    """
    op = "dgs_select"
    check_selection(op, rule, mass, keep, min_keep, seed)
    check_statistics(op, scale, eps, aggregate)
    same_device(op, rewards=rewards, group_offsets=group_offsets, weights=weights)
    parts = [part.detach() for part in per_modality(op, "rewards", rewards)]
    inputs = SelectionInputs(
        parts,
        group_offsets,
        weights,
        scale,
        float(eps),
        aggregate,
        rule,
        float(mass),
        None if keep is None else int(keep),
        int(min_keep),
        int(seed),
        choose(op, backend, *parts),
    )
    keep_S: Tensor = registered.dgs_select(*inputs)
    return keep_S


@implements("dgs_select", SelectionInputs, "Tensor", reads_back=True)  # of max_variance and random, the rewards
def select(inputs: SelectionInputs) -> Tensor:
    """[S] bool."""
    rewards, weights = inputs.rewards, inputs.weights
    for part in rewards:
        check_rewards("dgs_select", part, inputs.group_offsets, weights)
    module, offsets = module_of(inputs.backend), inputs.group_offsets.long().contiguous()
    how = (weights, inputs.scale, inputs.eps, inputs.aggregate)
    advantages_MS = torch.stack([advantages_of(module, part, offsets, *how) for part in rewards])
    keep_S: Tensor = module.dgs_select(
        advantage_energy(advantages_MS),
        total_reward(rewards, weights).contiguous(),
        offsets,
        rule=inputs.rule,
        mass=inputs.mass,
        keep=inputs.keep,
        min_keep=inputs.min_keep,
        seed=inputs.seed,
    )
    return keep_S


@fakes("dgs_select", SelectionInputs)
def _(inputs: SelectionInputs) -> Tensor:
    return inputs.rewards[0].new_empty(inputs.rewards[0].shape[:1], dtype=torch.bool)
