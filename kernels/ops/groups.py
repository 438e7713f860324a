"""`group_advantages`, `dgs_select` and both at once, `grpo_plan`: no gradient, every backend.

Dims: `S` sequences, `P` groups, `K` rewards, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_float, check_rewards
from ..dispatch import choose, module_of, same_device
from ..options import Aggregate, Rule, Scale, check_selection, check_statistics
from ..outputs import GRPOPlan
from ..plan import Rewards, Selection, Statistics, advantages_of, by_modality, per_modality, plan_rewards
from ..plan import select as selected
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
    """What `dgs_select` and `grpo_plan` are given: arguments of the registered ops."""

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

    def checked(self, op: str) -> tuple[ModuleType, Sequence[Tensor], Tensor, Tensor | None, Statistics, Selection]:
        """Checks values; what the plan is made of (`syncr1.kernels.plan`)."""
        for part in self.rewards:
            check_rewards(op, part, self.group_offsets, self.weights)
        offsets = self.group_offsets.long().contiguous()
        selection = Selection(self.rule, self.mass, self.keep, self.min_keep, self.seed)
        how = (self.scale, self.eps, self.aggregate)
        return module_of(self.backend), self.rewards, offsets, self.weights, how, selection


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


def _dtype(*rewards: Tensor) -> torch.dtype:
    return torch.float64 if any(part.dtype == torch.float64 for part in rewards) else torch.float32


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
    how = _statistics(op, scale, eps, aggregate)
    selection = Selection(rule, mass, keep, min_keep, seed)
    inputs = _selection_inputs(op, rewards, group_offsets, weights, how, selection, backend)
    keep_S: Tensor = registered.dgs_select(*inputs)
    return keep_S


def grpo_plan(
    rewards: Rewards,
    group_offsets: Tensor,
    *,
    weights: Tensor | None = None,
    scale: Scale = "group",
    eps: float = 1e-4,
    aggregate: Aggregate = "sum_then_normalize",
    dgs: Rule = "none",
    dgs_mass: float = 0.9,
    dgs_keep: int | None = None,
    dgs_min_keep: int = 2,
    dgs_seed: int = 0,
    backend: str | None = None,
) -> GRPOPlan:
    """Advantages and keep decision of a step, once: what is pruned never reaches a model, the loss is given the rest.

    `linear_grpo_loss(streams, rewards, …, dgs=…)` makes the same plan on its way, but by then every sequence has been
    through the model. Planned first, pruned sequences cost no forward, and loss and gradients are the same bits.

    Equivalent PyTorch, for one reward:
        advantages = group_advantages(rewards, group_offsets, scale=scale, eps=eps, aggregate=aggregate)
        keep = dgs_select(rewards, group_offsets, rule=dgs, mass=dgs_mass, …)
        # then: linear_grpo_loss(streams of what is kept, None, …, advantages=advantages)

    Args:
        rewards, group_offsets, weights: as in `dgs_select`; over the whole step, pruned sequences included.
        scale, eps, aggregate: as in `group_advantages`.
        dgs, dgs_mass, dgs_keep, dgs_min_keep, dgs_seed: rule, mass, keep, min_keep and seed of `dgs_select`, under the
            names and with the defaults that the losses have.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        GRPOPlan. A loss that takes its advantages leaves `dgs` at "none", and keeps the places of pruned sequences in
        cu_seqlens with zero tokens, so that means over sequences count them.

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: as `group_advantages` and `dgs_select`.
    """
    op = "grpo_plan"
    check_selection(op, dgs, dgs_mass, dgs_keep, dgs_min_keep, dgs_seed, prefix="dgs_")
    how = _statistics(op, scale, eps, aggregate)
    selection = Selection(dgs, dgs_mass, dgs_keep, dgs_min_keep, dgs_seed)
    inputs = _selection_inputs(op, rewards, group_offsets, weights, how, selection, backend)
    advantages_MS, keep_S, fraction = registered.grpo_plan(*inputs)
    return GRPOPlan(by_modality(advantages_MS), keep_S, fraction)


def _statistics(op: str, scale: str, eps: float, aggregate: str) -> Statistics:
    check_statistics(op, scale, eps, aggregate)
    return scale, float(eps), aggregate


def _selection_inputs(
    op: str,
    rewards: Rewards,
    group_offsets: Tensor,
    weights: Tensor | None,
    how: Statistics,
    selection: Selection,
    backend: str | None,
) -> SelectionInputs:
    same_device(op, rewards=rewards, group_offsets=group_offsets, weights=weights)
    parts = [part.detach() for part in per_modality(op, "rewards", rewards)]
    rule, mass, keep, min_keep, seed = selection
    return SelectionInputs(
        parts,
        group_offsets,
        weights,
        *how,
        rule=rule,
        mass=float(mass),
        keep=None if keep is None else int(keep),
        min_keep=int(min_keep),
        seed=int(seed),
        backend=choose(op, backend, *parts),
    )


@implements("dgs_select", SelectionInputs, "Tensor", reads_back=True)  # of max_variance and random, the rewards
def select(inputs: SelectionInputs) -> Tensor:
    """[S] bool."""
    return selected(*inputs.checked("dgs_select"))[1]


@fakes("dgs_select", SelectionInputs)
def _(inputs: SelectionInputs) -> Tensor:
    return inputs.rewards[0].new_empty(inputs.rewards[0].shape[:1], dtype=torch.bool)


@implements("grpo_plan", SelectionInputs, "(Tensor, Tensor, Tensor)", reads_back=True)  # as dgs_select
def make_plan(inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages [M, S], keep [S], frac_reward_zero_std)."""
    scores = plan_rewards(*inputs.checked("grpo_plan"))
    return scores.advantages.to(_dtype(*inputs.rewards)), scores.keep, scores.frac_reward_zero_std


@fakes("grpo_plan", SelectionInputs)
def _(inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor]:
    like = inputs.rewards[0]
    return (
        like.new_empty((len(inputs.rewards), like.shape[0]), dtype=_dtype(*inputs.rewards)),
        like.new_empty(like.shape[0], dtype=torch.bool),
        like.new_empty((), dtype=torch.float32),
    )
