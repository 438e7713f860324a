"""The plan: advantages, which sequences and tokens are worth multiplying, and with which weight.

What rewards decide is one function, `plan_rewards`, behind `grpo_plan`, `dgs_select` and both losses.  The row plan
behind it is made before any matrix product: pruned sequences, masked tokens and, where the KL is off, tokens whose
advantage is 0 leave the batch here, so they cost nothing; statistics and divisors still count what they must.

Dims: `T` packed tokens, `S` sequences, `P` groups, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .checks import check_modality_keys, checks_values, refuse
from .layout import PackedLayout
from .options import LossOptions, for_modality
from .reference.advantage import combine_advantages, combine_rewards, groups_with_variance
from .reference.segments import reduce_segments, sum_segments
from .streams import MODALITIES, TokenStream
from .terms import LossInputs

Rewards = Tensor | Mapping[str, Tensor]
Statistics = tuple[str, float, str]
"""scale, eps and aggregate of `group_advantages`."""


class GroupStatistics(Protocol):
    """The part of a backend that the plan needs; see `syncr1.kernels.terms.Backend`."""

    def group_advantages(self, reward_S: Tensor, group_offsets: Tensor, scale: str, eps: float) -> Tensor: ...

    def dgs_select(
        self,
        energy_S: Tensor,
        reward_S: Tensor,
        group_offsets: Tensor,
        *,
        rule: str,
        mass: float,
        keep: int | None,
        min_keep: int,
        seed: int,
    ) -> Tensor: ...


class Selection(NamedTuple):
    """A DGS rule and its numbers, as a backend's `dgs_select` takes them."""

    rule: str
    mass: float
    keep: int | None
    min_keep: int
    seed: int

    @classmethod
    def of(cls, settings: LossOptions) -> Selection:
        return cls(settings.dgs, settings.dgs_mass, settings.dgs_keep, settings.dgs_min_keep, settings.dgs_seed)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What the rewards say about each sequence."""

    advantages: Tensor
    """[M, S]."""
    keep: Tensor
    """[S] bool."""
    frac_reward_zero_std: Tensor
    """Scalar in [0, 1]: groups whose rewards are all equal, in every modality."""


def per_modality(op: str, name: str, values: Rewards) -> list[Tensor]:
    """One tensor, or those of text and image, of equal length."""
    if isinstance(values, Tensor):
        return [values]
    check_modality_keys(op, name, values)
    text, image = values["text"], values["image"]
    if text.shape[:1] != image.shape[:1]:
        refuse(op, f"{name}['image']", f"of {text.shape[0]} sequences", image.shape[0], "both cover all S sequences")
    return [text, image]


def by_modality(values_MS: Tensor) -> Tensor | dict[str, Tensor]:
    """[M, S] as it is handed out: [S], or one [S] per modality."""
    return values_MS[0] if values_MS.shape[0] == 1 else dict(zip(MODALITIES, values_MS.unbind(), strict=True))


def advantages_of(
    backend: GroupStatistics,
    rewards: Tensor,
    group_offsets: Tensor,
    weights: Tensor | None,
    scale: str,
    eps: float,
    aggregate: str,
) -> Tensor:
    """[S] or [S, K] validated rewards → [S]."""
    if rewards.dim() == 2 and aggregate == "normalize_then_sum":
        exact = combine_advantages(rewards, group_offsets, weights, scale, eps)
        return exact if rewards.dtype == torch.float64 else exact.float()
    reward_S = combine_rewards(rewards, weights)
    return backend.group_advantages(reward_S.contiguous(), group_offsets.long().contiguous(), scale, eps)


def total_reward(rewards: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """What top_k and max_variance rank by: the sum of all rewards present, NaN where none is: [S] float64."""
    return combine_rewards(torch.stack([combine_rewards(r, weights) for r in rewards], dim=1), None)


def advantage_energy(advantages_MS: Tensor) -> Tensor:
    """Σ over modalities of A², from float32 advantages: [S] float64."""
    return advantages_MS.float().double().square().sum(dim=0)


def select(
    backend: GroupStatistics,
    rewards: Sequence[Tensor],
    group_offsets: Tensor,
    weights: Tensor | None,
    how: Statistics,
    selection: Selection,
) -> tuple[Tensor, Tensor]:
    """(advantages [M, S] from all members of each group, keep [S] from those advantages)."""
    advantages_MS = torch.stack([advantages_of(backend, part, group_offsets, weights, *how) for part in rewards])
    energy_S, ranked_S = advantage_energy(advantages_MS), total_reward(rewards, weights).contiguous()
    keep_S = backend.dgs_select(energy_S, ranked_S, group_offsets, **selection._asdict())
    return advantages_MS, keep_S


def plan_rewards(
    backend: GroupStatistics,
    rewards: Sequence[Tensor],
    group_offsets: Tensor,
    weights: Tensor | None,
    how: Statistics,
    selection: Selection,
) -> Scores:
    """One or two [S] or [S, K] of detached, validated rewards; group_offsets are [P+1] int64, contiguous."""
    advantages_MS, keep_S = select(backend, rewards, group_offsets, weights, how, selection)
    combined = [combine_rewards(part, weights) for part in rewards]
    varies_P = torch.stack([groups_with_variance(reward_S, group_offsets) for reward_S in combined]).any(dim=0)
    return Scores(advantages_MS, keep_S, _fraction_without(varies_P))


def score_rewards(backend: GroupStatistics, inputs: LossInputs) -> Scores:
    """The plan of a loss: from its rewards, or from advantages that were planned before."""
    settings, offsets = inputs.options, inputs.group_offsets.long().contiguous()
    selection = Selection.of(settings)
    if not inputs.advantages:
        parts = [part.detach() for part in inputs.rewards]
        how = (settings.scale, settings.eps, settings.aggregate)
        return plan_rewards(backend, parts, offsets, inputs.weights, how, selection)
    advantages_MS = torch.stack([part.detach() for part in inputs.advantages])
    ranked_S = advantages_MS.double().sum(dim=0)
    keep_S = backend.dgs_select(advantage_energy(advantages_MS), ranked_S.contiguous(), offsets, **selection._asdict())
    varies_P = reduce_segments(advantages_MS.double().abs().amax(dim=0), offsets, "max") > 0
    return Scores(advantages_MS, keep_S, _fraction_without(varies_P))


def _fraction_without(varies_P: Tensor) -> Tensor:
    return (~varies_P).sum() / max(varies_P.numel(), 1)


def without_pruned(
    inputs: LossInputs, layout: PackedLayout, keep_S: Tensor, kept: Tensor
) -> tuple[LossInputs, PackedLayout]:
    """The call as it had been if pruned sequences had not been packed: sums then run over the same tokens in the same
    order, and pruning before the forward or behind it gives the same bits. `kept` [T'] are the others' tokens."""
    old_logp, ref_logp, entropy = (
        None if values is None else values[kept] for values in (inputs.old_logp, inputs.ref_logp, inputs.entropy)
    )
    is_ratio = inputs.is_ratio
    if is_ratio is not None:
        is_ratio = is_ratio[kept] if is_ratio.shape == (layout.num_tokens,) else is_ratio.reshape(-1, 1)
    ends_S = (layout.cu_seqlens.diff() * keep_S).cumsum(0)
    thinned = replace(
        layout,
        cu_seqlens=torch.cat([ends_S.new_zeros(1), ends_S]).to(layout.cu_seqlens.dtype),
        modality=None if layout.modality is None else layout.modality[kept],
        loss_mask=None if layout.loss_mask is None else layout.loss_mask[kept],
        total=kept.shape[0],
    )
    return inputs._replace(old_logp=old_logp, ref_logp=ref_logp, entropy=entropy, is_ratio=is_ratio), thinned


def policy_mask(layout: PackedLayout, scores: Scores) -> Tensor:
    """[T] bool: tokens that carry loss."""
    kept_T = scores.keep[layout.sequence_of_token]
    return kept_T if layout.loss_mask is None else kept_T & layout.loss_mask


def stream_layout(op: str, streams: Sequence[TokenStream], layout: PackedLayout) -> PackedLayout:
    """The layout with the mask and modality that the streams give: a token that none covers carries no loss."""
    device = streams[0].hidden.device
    covered_T = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    modality_T = torch.zeros(layout.num_tokens, dtype=torch.uint8, device=device)
    for stream in streams:
        rows = stream.rows.long()
        covered_T.index_fill_(0, rows, True)
        modality_T.index_fill_(0, rows, MODALITIES.index(stream.modality))
    given_T = layout.modality
    if given_T is not None and checks_values(covered_T) and bool((given_T != modality_T)[covered_T].any()):
        refuse(op, "modality", "that of the streams", "another one at some rows", "leave it out: streams carry it")
    mask_T = covered_T if layout.loss_mask is None else covered_T & layout.loss_mask
    return replace(layout, modality=modality_T, loss_mask=mask_T)


def token_advantages(scores: Scores, sequence_T: Tensor, image_T: Tensor) -> Tensor:
    """[T]: the advantage of the token's sequence, from the rewards of the token's own modality."""
    per_sequence = [part[sequence_T] for part in scores.advantages.unbind()]
    return per_sequence[0] if len(per_sequence) == 1 else torch.where(image_T, per_sequence[1], per_sequence[0])


def acting_tokens(settings: LossOptions, scores: Scores, mask_T: Tensor, sequence_T: Tensor, image_T: Tensor) -> Tensor:
    """[T] bool: loss tokens whose gradient or metrics need their log-probability.

    Without KL a token of advantage 0 has neither loss nor gradient. Where the loss of a token depends on the others of
    its sequence (sequence ratios, vespo, means per sequence), a sequence goes as a whole.
    """
    betas = {for_modality(settings.beta, m) for m in MODALITIES}
    if settings.score_all or betas != {0.0} or settings.top_entropy_quantile < 1:
        return mask_T
    alone = settings.ratio == "token" and settings.loss_type not in ("vespo", "grpo", "sapo")
    if alone:
        return mask_T & (token_advantages(scores, sequence_T, image_T) != 0)
    return mask_T & (scores.advantages != 0).any(dim=0)[sequence_T]


def modality_masks(settings: LossOptions, mask_T: Tensor, image_T: Tensor) -> list[Tensor]:
    """What is reduced on its own: all loss tokens, or, with `num_items` per modality, those of text and of image."""
    return [mask_T & ~image_T, mask_T & image_T] if settings.splits_modalities else [mask_T]


def divisors(settings: LossOptions, masks: Sequence[Tensor], given: Tensor | None) -> Tensor:
    """Divisor of bnpo, dapo, cispo and vespo for each of `masks`: [len(masks)] float32, ≥ 1."""
    counts = torch.stack([mask.sum() for mask in masks]).float()
    if settings.loss_type == "bnpo":
        return counts.clamp_min(1)
    if given is not None:
        return given.float().reshape(-1).to(counts.device).expand(len(masks)).clamp_min(1)
    values = settings.num_items
    if values is None:
        return counts.clamp_min(1)
    numbers = [float(values[m]) for m in MODALITIES] if isinstance(values, Mapping) else [float(values)]
    # Filled on the device: a tensor made of Python numbers is copied there, and the host waits for it.
    return torch.stack([counts.new_full((), max(number, 1.0)) for number in numbers])


def token_weights(
    settings: LossOptions,
    layout: PackedLayout,
    mask_T: Tensor,
    image_T: Tensor,
    sequence_T: Tensor,
    given: Tensor | None,
) -> Tensor:
    """[T] float32 w with loss = Σ w · token loss: every reduction is linear."""
    masks = modality_masks(settings, mask_T, image_T)
    num_sequences = layout.num_sequences if settings.num_sequences is None else settings.num_sequences
    num_sequences = max(num_sequences, 1)
    weight_T = torch.zeros(mask_T.shape[0], dtype=torch.float32, device=mask_T.device)
    divisor = divisors(settings, masks, given)
    for index, part_T in enumerate(masks):
        if settings.loss_type in ("grpo", "sapo"):
            count_S = sum_segments(part_T.float(), layout.cu_seqlens)
            factor_T = 1.0 / (count_S.clamp_min(1) * num_sequences)[sequence_T]
        elif settings.loss_type == "luspo":
            factor_T = torch.full_like(weight_T, 1.0 / num_sequences)
        elif settings.loss_type == "dr_grpo":
            assert settings.max_length is not None  # LossOptions checked it
            factor_T = torch.full_like(weight_T, 1.0 / (num_sequences * settings.max_length))
        else:
            factor_T = (1.0 / divisor[index]).expand_as(weight_T)
        weight_T = torch.where(part_T, factor_T, weight_T)
    text, image = (for_modality(settings.weight, m) for m in MODALITIES)
    return weight_T * text if text == image else weight_T * torch.where(image_T, image, text)


def entropy_thresholds(settings: LossOptions, entropy_T: Tensor, mask_T: Tensor, image_T: Tensor) -> Tensor:
    """[2]: the entropy from which the policy term acts, by a quantile of each modality's own loss tokens.

    Image entropies lie far above those of text: one quantile for both would switch one of them off.
    """
    thresholds = entropy_T.new_zeros(2)
    for index, part_T in enumerate((mask_T & ~image_T, mask_T & image_T)):
        values = entropy_T[part_T]
        if values.numel():
            num_dropped = int((1 - settings.top_entropy_quantile) * values.numel())
            thresholds[index] = values.sort().values[num_dropped]
    return thresholds
