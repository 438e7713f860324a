"""Rows of products in C++: log-probability, entropy and gradients. Dims: `C` rows, `V` vocabulary."""

from __future__ import annotations

import ctypes
import math
from ctypes import byref, c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ..terms import ROW_LOSSES, Head, RowSettings, RowTerms
from .library import INT, POINTER, function, pointer


class Rows(ctypes.Structure):
    """`syncr1_rows` of csrc/rows.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("products", "targets", "bias", "forbidden", "support")),
        *((name, c_int64) for name in ("bfloat16", "row_stride", "num_rows", "vocabulary", "num_forbidden")),
        ("num_threads", c_int64),
        ("temperature", c_double),
    )


class RowTermPointers(ctypes.Structure):
    """`syncr1_row_terms` of csrc/rows.cpp."""

    _fields_ = tuple((name, c_void_p) for name in ("advantage", "weight", "old_logp", "ref_logp", "is_ratio"))


class Settings(ctypes.Structure):
    """`RowSettings` of csrc/token_loss.h."""

    _fields_ = (
        ("loss", c_int64),
        *((name, c_float) for name in ("clip_low", "clip_high", "delta", "beta")),
        ("bias_corrected_kl", c_int32),
        *((name, c_float) for name in ("sapo_pos", "sapo_neg")),
    )


def _rows(products: Tensor, targets: Tensor, head: Head, bias_V: Tensor | None) -> Rows:
    """`bias_V` is head.bias in float32: whoever makes it keeps it alive over the call."""
    forbidden = head.forbidden
    return Rows(
        pointer(products),
        pointer(targets),
        pointer(bias_V),
        pointer(forbidden),
        pointer(head.support),
        products.dtype == torch.bfloat16,
        products.stride(0),
        *products.shape,
        0 if forbidden is None else forbidden.numel(),
        torch.get_num_threads(),
        head.temperature,
    )


def _float_bias(head: Head) -> Tensor | None:
    return None if head.bias is None else head.bias.float().contiguous()


def score_rows(products: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [C], entropy [C], logsumexp [C] float64), in one sweep over memory."""
    call = function("syncr1_score_rows", POINTER, POINTER, POINTER, POINTER)
    bias_V = _float_bias(head)
    logp_C, entropy_C = (torch.empty(products.shape[0]) for _ in range(2))
    lse_C = torch.empty(products.shape[0], dtype=torch.float64)
    call(byref(_rows(products, targets, head, bias_V)), pointer(logp_C), pointer(entropy_C), pointer(lse_C))
    return logp_C, entropy_C, lse_C


def loss_rows(
    products: Tensor, targets: Tensor, head: Head, terms: RowTerms, settings: RowSettings
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), each [C] float32; `products` becomes the gradient of Σ weight · token loss."""
    call = function("syncr1_loss_rows", POINTER, POINTER, POINTER, POINTER, POINTER)
    bias_V = _float_bias(head)
    logp_C, entropy_C = (torch.empty(products.shape[0]) for _ in range(2))
    parts = (terms.advantage, terms.weight, terms.old_logp, terms.ref_logp, terms.is_ratio)
    numbers = Settings(
        ROW_LOSSES.index(settings.loss),
        settings.clip_low,
        settings.clip_high,
        math.inf if settings.delta is None else settings.delta,
        settings.beta,
        settings.bias_corrected_kl,
        settings.sapo_temperature_pos,
        settings.sapo_temperature_neg,
    )
    call(
        byref(_rows(products, targets, head, bias_V)),
        byref(RowTermPointers(*map(pointer, parts))),
        byref(numbers),
        pointer(logp_C),
        pointer(entropy_C),
    )
    return logp_C, entropy_C


def gradient_rows(
    products: Tensor,
    targets: Tensor,
    head: Head,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """Writes Σ_n grad_logp_n d logp_n + grad_entropy_n d H_n into `out`; exactly 0 in rows where both are 0."""
    call = function("syncr1_gradient_rows", POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT, INT)
    bias_V = _float_bias(head)
    call(
        byref(_rows(products, targets, head, bias_V)),
        pointer(lse),
        pointer(entropy),
        pointer(grad_logp),
        pointer(grad_entropy),
        pointer(out),
        out.dtype == torch.bfloat16,
        out.stride(0),
    )
