"""Token losses → scalar, and metrics per modality. Dims: `T` packed tokens, `S` sequences."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..options import LossOptions, PerModality, for_modality
from ..plan import Scores, entropy_thresholds
from ..streams import MODALITIES
from .logp import accumulator
from .segments import sum_segments


class PackedTerms:
    """The layout, masks and settings of one loss, with what several formulas need from them.

    `mask_T` are the tokens whose loss is formed; divisors count those of `counted_T`, which holds more where tokens
    without gradient were left out.
    """

    def __init__(
        self,
        layout: PackedLayout,
        mask_T: Tensor,
        counted_T: Tensor,
        dtype: torch.dtype,
        settings: LossOptions,
        num_items: Tensor | None = None,
    ) -> None:
        self.layout, self.mask_T, self.counted_T, self.settings = layout, mask_T, counted_T, settings
        self.num_items = num_items
        self.dtype = accumulator(dtype)

    @cached_property
    def sequence_T(self) -> Tensor:
        return self.layout.sequence_of_token

    @cached_property
    def image_T(self) -> Tensor:
        """[T] bool."""
        return self.layout.image_tokens

    @cached_property
    def count_S(self) -> Tensor:
        """Loss tokens of each sequence: [S]."""
        return sum_segments(self.mask_T.to(self.dtype), self.layout.cu_seqlens)

    def masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T] with `fill` outside the mask, before any exp: what lies there may be NaN or inf."""
        return torch.where(self.mask_T, values.to(self.dtype), fill)

    def modality_masks(self, mask_T: Tensor) -> dict[str, Tensor]:
        """A mask split by modality: [T] bool each; text alone where the layout has no modality."""
        if self.layout.modality is None:
            return {"text": mask_T}
        return {"text": mask_T & ~self.image_T, "image": mask_T & self.image_T}


def per_token(value: PerModality, terms: PackedTerms) -> Tensor:
    """A setting as a 0-d tensor, or [T] where it differs by modality."""
    text, image = (
        torch.tensor(for_modality(value, m), dtype=terms.dtype, device=terms.mask_T.device) for m in MODALITIES
    )
    return torch.where(terms.image_T, image, text) if isinstance(value, Mapping) else text


def reduce_loss(loss_T: Tensor, terms: PackedTerms) -> Tensor:
    """Scalar. With `num_items` per modality each modality is reduced on its own and the two are added."""
    num_items = terms.settings.num_items
    if not isinstance(num_items, Mapping):
        return _reduce_masked(loss_T, terms.counted_T, num_items if terms.num_items is None else terms.num_items, terms)
    losses = [
        _reduce_masked(loss_T, mask_T, num_items[name] if terms.num_items is None else terms.num_items[index], terms)
        for index, (name, mask_T) in enumerate(terms.modality_masks(terms.counted_T).items())
    ]
    return torch.stack(losses).sum()


def _reduce_masked(loss_T: Tensor, counted_T: Tensor, num_items: float | Tensor | None, terms: PackedTerms) -> Tensor:
    settings, offsets = terms.settings, terms.layout.cu_seqlens
    used_T = torch.where(counted_T & terms.mask_T, loss_T, 0.0)
    num_sequences = terms.layout.num_sequences if settings.num_sequences is None else settings.num_sequences
    num_sequences = max(num_sequences, 1)
    if settings.loss_type in ("grpo", "sapo"):
        count_S = sum_segments(counted_T.to(terms.dtype), offsets)
        return (sum_segments(used_T, offsets) / count_S.clamp_min(1)).sum() / num_sequences
    if settings.loss_type == "luspo":
        return used_T.sum() / num_sequences
    if settings.loss_type == "dr_grpo":
        assert settings.max_length is not None  # LossOptions checked it
        return used_T.sum() / (num_sequences * settings.max_length)
    if settings.loss_type == "bnpo" or num_items is None:
        return used_T.sum() / counted_T.sum().clamp_min(1)
    return used_T.sum() / torch.as_tensor(num_items, dtype=terms.dtype, device=used_T.device).reshape(()).clamp_min(1)


def entropy_quantile_mask(entropy: Tensor | None, terms: PackedTerms) -> Tensor:
    """[T] 0/1: the tokens of highest entropy, by a quantile of each modality's own loss tokens."""
    assert entropy is not None  # the op checked it
    thresholds = entropy_thresholds(terms.settings, entropy.detach(), terms.mask_T, terms.image_T).to(terms.dtype)
    threshold_T = torch.where(terms.image_T, thresholds[1], thresholds[0])
    return (terms.mask_T & (entropy.detach().to(terms.dtype) >= threshold_T)).to(terms.dtype)


def loss_metrics(
    terms: PackedTerms,
    ratio_T: Tensor,
    advantage_T: Tensor,
    kl_T: Tensor | None,
    entropy_T: Tensor | None,
    scores: Scores,
) -> dict[str, Tensor]:
    """Scalars; the same keys on every rank, so that they can be averaged (weight them by `tokens/…`)."""
    low_T, high_T = _clip_events(ratio_T, advantage_T, terms)
    metrics = {
        "frac_reward_zero_std": scores.frac_reward_zero_std.float(),
        "frac_kept": scores.keep.float().sum() / max(scores.keep.numel(), 1),
    }
    for name, mask_T in terms.modality_masks(terms.mask_T).items():
        num_tokens = mask_T.sum()
        averaged = {"clip_low": low_T, "clip_high": high_T, "ratio_mean": ratio_T, "kl": kl_T, "entropy": entropy_T}
        for key, values_T in averaged.items():
            if values_T is not None:
                total = torch.where(mask_T, values_T.detach().to(terms.dtype), 0.0).sum()
                metrics[f"{key}/{name}"] = total / num_tokens.clamp_min(1)
        selected = ratio_T[mask_T]
        metrics[f"ratio_max/{name}"] = selected.max() if selected.numel() else ratio_T.new_ones(())
        metrics[f"ratio_min/{name}"] = selected.min() if selected.numel() else ratio_T.new_ones(())
        metrics[f"tokens/{name}"] = num_tokens
    return metrics


def _clip_events(ratio_T: Tensor, advantage_T: Tensor, terms: PackedTerms) -> tuple[Tensor, Tensor]:
    """Where the clip bounds take the gradient away: [T] bool, below and above."""
    settings = terms.settings
    high = per_token(settings.clip_high, terms)
    if settings.loss_type == "cispo":
        return torch.zeros_like(terms.mask_T), (ratio_T > high) & (advantage_T > 0)
    low_T = (ratio_T < 1 - per_token(settings.clip_low, terms)) & (advantage_T < 0)
    return low_T, (ratio_T > 1 + high) & (advantage_T > 0)
