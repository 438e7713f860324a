"""A loss of Liger's on a padded batch: its settings, its inputs made packed, its formulas from log-probabilities.

Dims: `B` sequences, `T` tokens of each, padding included.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..options import LOSS_TYPES
from ..reference.loss import MAX_LOG_RATIO, MIN_LOG_WEIGHT

TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A loss, in the names of `LossOptions`."""

    loss_type: str
    ratio: str
    clip_low: float
    clip_high: float
    delta: float | None
    beta: float
    bias_corrected_kl: bool
    max_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def check(self) -> None:
        """Liger's conditions and errors, those that both of its losses have."""
        if self.ratio == "sequence" and self.loss_type in TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type='{self.loss_type}'. "
                "Use importance_sampling_level='token' instead."
            )
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {self.ratio!r}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"Unknown loss_type '{self.loss_type}'. Supported types: {list(LOSS_TYPES)}")

    def check_sapo_temperatures(self) -> None:
        """Both divide."""
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def options(self) -> dict[str, Any]:
        """As keywords of the ops."""
        named = asdict(self)
        return named if self.loss_type not in TOKEN_LEVEL_ONLY else named | {"delta": None}


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """A padded batch, detached, with something harmless at masked positions."""

    settings: Settings
    mask: Tensor
    """[B, T] bool."""
    targets: Tensor
    """[B, T] int64."""
    advantage: Tensor
    """[B]."""
    old: Tensor | None
    """[B, T]; None = on policy."""
    ref: Tensor | None
    """[B, T]; None = no KL."""
    is_ratio: Tensor | None
    """[B, 1] or [B, T]."""
    num_items: Tensor | None
    """Divisor of dapo, cispo and vespo."""
    luspo_by_sequence: bool
    """Policy losses of luspo count once per sequence, not once per token of it over T."""

    @property
    def count(self) -> Tensor:
        """[B] tokens that carry loss."""
        return self.mask.sum(dim=-1)

    @property
    def packable(self) -> bool:
        """The packed ops have this loss: luspo's KL has weights of its own; vespo's sum would stop at the mask."""
        if self.settings.loss_type == "luspo":
            return self.ref is None
        return self.settings.loss_type != "vespo" or self.is_ratio is None or self.is_ratio.shape[1] == 1

    def packed(self) -> dict[str, Any]:
        """Arguments of `grpo_loss` and `linear_grpo_loss`."""
        size, length = self.mask.shape
        device, advantage = self.mask.device, self.advantage
        if self.settings.loss_type == "luspo" and not self.luspo_by_sequence:
            advantage = advantage * self.count / max(length, 1)  # the loss is linear in A
        is_ratio = self.is_ratio
        if is_ratio is not None and is_ratio.shape[1] > 1:
            is_ratio = is_ratio.reshape(-1)
        return self.settings.options() | {
            "rewards": None,
            "advantages": advantage,
            "cu_seqlens": torch.arange(size + 1, device=device) * length,
            "group_offsets": torch.tensor([0, size], device=device),
            "old_logp": _flat(self.old),
            "loss_mask": _flat(self.mask),
            "ref_logp": _flat(self.ref),
            "is_ratio": is_ratio,
            "beta": 0.0 if self.ref is None else self.settings.beta,
            "num_items": self.num_items,
        }


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)


def make_batch(
    settings: Settings,
    mask: Tensor,
    ids: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    is_ratio: Tensor | None,
    num_items: Tensor | float | None,
    *,
    luspo_by_sequence: bool,
) -> PaddedBatch:
    """Checks and cleans what a loss of log-probabilities takes."""
    mask_BT = mask != 0
    size, length = mask_BT.shape
    if is_ratio is not None:
        ratio_shape = tuple(is_ratio.shape)
        assert is_ratio.dim() in (1, 2), f"vllm_is_ratio must be (B,), (B, 1) or (B, T), got {is_ratio.dim()}D"
        assert ratio_shape in ((size,), (size, 1), (size, length)), (
            f"vllm_is_ratio shape must be ({size},), ({size}, 1) or ({size}, {length}), got {ratio_shape}"
        )
        is_ratio = is_ratio.detach().float().reshape(size, -1) if size else None
    if is_ratio is not None:
        used = mask_BT if is_ratio.shape[1] == length else mask_BT.any(dim=1, keepdim=True)
        counts = used | ~is_ratio.isnan() if settings.loss_type == "vespo" else used
        is_ratio = torch.where(counts, is_ratio, 1.0)
    divisor = None
    if settings.loss_type in ("dapo", "cispo", "vespo"):
        divisor = _tokens_per_process(mask_BT, num_items)
    old, ref = (None if part is None else torch.where(mask_BT, part.detach(), 0.0) for part in (old, ref))
    return PaddedBatch(
        settings=settings,
        mask=mask_BT,
        targets=torch.where(mask_BT, ids, 0).long(),
        advantage=torch.where(mask_BT.any(dim=1), advantages.detach(), 0.0),
        old=old,
        ref=ref if settings.beta != 0 else None,
        is_ratio=is_ratio,
        num_items=divisor,
        luspo_by_sequence=luspo_by_sequence,
    )


def _tokens_per_process(mask_BT: Tensor, num_items: Tensor | float | None) -> Tensor:
    """Loss tokens of the whole generation batch where given, else of all ranks' batches, divided by the ranks: ≥ 1."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items is not None:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=mask_BT.device)
    else:
        total = mask_BT.sum(dtype=torch.float32)
        if distributed:
            dist.all_reduce(total)
    return (total / (dist.get_world_size() if distributed else 1)).clamp_min(1)


def _log_ratio(logp_BT: Tensor, batch: PaddedBatch) -> Tensor:
    old = logp_BT.detach() if batch.old is None else batch.old
    return (logp_BT - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _importance_ratio(log_ratio_BT: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, T], or [B, 1] per sequence."""
    if batch.settings.ratio == "sequence":
        return (log_ratio_BT.sum(dim=1) / batch.count.clamp_min(1)).exp().unsqueeze(1)
    return log_ratio_BT.exp()


def _policy_loss(logp_BT: Tensor, log_ratio_BT: Tensor, ratio: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, T] or [B, 1], with the sampler's correction."""
    s, advantage = batch.settings, batch.advantage.unsqueeze(1)
    if s.loss_type == "vespo":  # the correction goes into its weight
        return -_vespo_weight(log_ratio_BT.detach(), batch) * advantage * logp_BT
    if s.loss_type == "cispo":
        loss = -ratio.clamp(max=s.clip_high).detach() * advantage * logp_BT
    elif s.loss_type == "sapo":
        tau = torch.where(advantage > 0, s.sapo_temperature_pos, s.sapo_temperature_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    else:
        bounded = ratio if s.delta is None else ratio.clamp(max=s.delta)
        loss = -torch.minimum(bounded * advantage, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * advantage)
    return loss if batch.is_ratio is None else loss * batch.is_ratio


def _vespo_weight(log_ratio_BT: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, 1] φ(w) = e^λ w^k e^(−λw)."""
    s, log_w = batch.settings, log_ratio_BT.sum(dim=1, keepdim=True)
    if batch.is_ratio is not None:
        log_w = log_w + batch.is_ratio.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO).sum(dim=1, keepdim=True)
    log_w = log_w.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    positive = batch.advantage.unsqueeze(1) >= 0
    k = torch.where(positive, s.vespo_k_pos, s.vespo_k_neg)
    lam = torch.where(positive, s.vespo_lambda_pos, s.vespo_lambda_neg).clamp_min(1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _kl(logp_BT: Tensor, ratio: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, T]; 0 where there is no reference policy."""
    if batch.ref is None:
        return torch.zeros_like(logp_BT)
    difference = (batch.ref - logp_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = difference.exp() - difference - 1
    return kl * ratio if batch.settings.bias_corrected_kl else kl


def _is_clipped(ratio: Tensor, batch: PaddedBatch) -> Tensor:
    """[B, T] bool."""
    s, advantage = batch.settings, batch.advantage.unsqueeze(1)
    if s.loss_type in ("sapo", "vespo"):
        return torch.zeros_like(batch.mask)
    if s.loss_type == "cispo":
        return (ratio > s.clip_high) & (advantage > 0) & batch.mask
    low, high = ratio < 1 - s.clip_low, ratio > 1 + s.clip_high
    return ((low & (advantage < 0)) | (high & (advantage > 0))) & batch.mask


def token_terms(logp_BT: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(policy loss, KL, is clipped), [B, T] each, 0 at masked positions."""
    logp_BT = torch.where(batch.mask, logp_BT, 0.0)
    log_ratio_BT = _log_ratio(logp_BT, batch)
    ratio = _importance_ratio(log_ratio_BT, batch)
    policy = _policy_loss(logp_BT, log_ratio_BT, ratio, batch)
    policy, kl = (torch.where(batch.mask, part, 0.0) for part in (policy, _kl(logp_BT, ratio, batch)))
    return policy, kl, _is_clipped(ratio, batch)


def padded_loss(logp_BT: Tensor, batch: PaddedBatch) -> Tensor:
    """The two losses that are not `packable`."""
    policy, kl, _ = token_terms(logp_BT, batch)
    beta, (size, length) = batch.settings.beta, batch.mask.shape
    if batch.num_items is not None:
        return (policy + beta * kl).sum() / batch.num_items.to(policy.dtype)
    by_length = batch.count.unsqueeze(1) / (max(size, 1) * max(length, 1))
    return (policy * (1 / max(size, 1) if batch.luspo_by_sequence else by_length) + beta * kl * by_length).sum()


@torch.no_grad()
def loss_metrics(logp_BT: Tensor, batch: PaddedBatch) -> list[Tensor]:
    """[mean KL, clipped fraction], without the first where beta is 0."""
    _, kl, clipped = token_terms(logp_BT, batch)
    count = batch.mask.sum().clamp_min(1)
    fraction = clipped.sum(dtype=torch.float32) / count
    return [fraction] if batch.settings.beta == 0 else [(kl.sum() / count).float(), fraction]
