"""Launches the row kernels: how a row is cut, and what they compile to ahead of time.

Dims: `C` rows of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from syncr1.kernels.terms import ROW_LOSSES, Head, RowSettings, RowTerms
from syncr1.kernels.triton_ops.launch import on_device
from syncr1.kernels.triton_ops.row_kernels import (
    Numbers,
    RowForm,
    Terms,
    gradient_rows_kernel,
    loss_rows_kernel,
    score_rows_kernel,
)
from syncr1.kernels.triton_ops.row_math import LOG2E

SCORE_RESIDENT_IDS = 8192
"""Longest row that scoring holds in registers. It reads once in either form: the cut only balances occupancy."""
LOSS_RESIDENT_BYTES = 32768
"""Longest row that the loss holds in registers, to read it once; beyond, two programs do not fit a multiprocessor."""
STREAM_TILE = 8192
SCORE_WARPS = 8
"""Of a longer row, one sweep: several programs share a multiprocessor and hide each other's memory latency."""
LOSS_WARPS = 16
"""Of a longer row, two sweeps: few rows in flight, so that the second one still finds them in L2."""
GRADIENT_WARPS = 8


def row_form(vocabulary: int, itemsize: int, forbidden: bool, resident: bool, stream_warps: int) -> tuple[RowForm, int]:
    """The cut of a row and its warps. It depends on the vocabulary and the dtype alone, not on the number of rows: a
    row's bits do not depend on its chunk."""
    if resident:
        columns = max(triton.next_power_of_2(vocabulary), 32)
        return RowForm(forbidden, True, 1, columns), max(1, columns // 1024)
    # Every lane reads 16 bytes along the row; the tile's rows then lie in the registers of one thread.
    columns = stream_warps * 32 * (16 // itemsize)
    return RowForm(forbidden, False, STREAM_TILE // columns, columns), stream_warps


def score_form(vocabulary: int, itemsize: int, forbidden: bool) -> tuple[RowForm, int]:
    """See `row_form`."""
    return row_form(vocabulary, itemsize, forbidden, vocabulary <= SCORE_RESIDENT_IDS, SCORE_WARPS)


def loss_form(vocabulary: int, itemsize: int, forbidden: bool) -> tuple[RowForm, int]:
    """See `row_form`."""
    return row_form(vocabulary, itemsize, forbidden, vocabulary * itemsize <= LOSS_RESIDENT_BYTES, LOSS_WARPS)


def gradient_tile(vocabulary: int) -> tuple[int, int]:
    """Ids per step, and warps."""
    tile = min(max(triton.next_power_of_2(vocabulary), 32), STREAM_TILE)
    return tile, max(1, tile * GRADIENT_WARPS // STREAM_TILE)


def logit_shift(head: Head, products: Tensor) -> tuple[Tensor | None, bool]:
    """[V] what is added to the products, and whether some of it is -inf."""
    if head.forbidden is None or head.forbidden.numel() == 0:
        return head.bias, False
    shift = products.new_zeros(products.shape[1]) if head.bias is None else head.bias.clone()
    return shift.index_fill_(0, head.forbidden, -torch.inf), True


def empty_rows(products: Tensor, count: int) -> list[Tensor]:
    """Outputs, [C] float32 each."""
    return [torch.empty(products.shape[0], dtype=torch.float32, device=products.device) for _ in range(count)]


def score_rows(products: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """See `terms.Backend`."""
    num_rows, vocabulary = products.shape
    logp, entropy = empty_rows(products, 2)
    lse = torch.empty(num_rows, dtype=torch.float64, device=products.device)
    if num_rows == 0:
        return logp, entropy, lse
    with on_device(products):
        shift, forbidden = logit_shift(head, products)
        form, num_warps = score_form(vocabulary, products.element_size(), forbidden)
        score_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            targets,
            logp,
            entropy,
            lse,
            vocabulary,
            LOG2E.value / head.temperature,
            FORM=form,
            num_warps=num_warps,
        )
    return logp, entropy, lse


def loss_rows(
    products: Tensor, targets: Tensor, head: Head, terms: RowTerms, settings: RowSettings
) -> tuple[Tensor, Tensor]:
    """See `terms.Backend`."""
    num_rows, vocabulary = products.shape
    logp, entropy = empty_rows(products, 2)
    if num_rows == 0:
        return logp, entropy
    delta = float("inf") if settings.delta is None else settings.delta
    sapo = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    with on_device(products):
        shift, forbidden = logit_shift(head, products)
        form, num_warps = loss_form(vocabulary, products.element_size(), forbidden)
        loss_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            targets,
            Terms(terms.advantage, terms.weight, terms.old_logp, terms.ref_logp, terms.is_ratio),
            logp,
            entropy,
            vocabulary,
            LOG2E.value / head.temperature,
            1.0 / head.temperature,
            Numbers(settings.clip_low, settings.clip_high, delta, settings.beta, *sapo),
            LOSS=ROW_LOSSES.index(settings.loss),
            BIAS_CORRECTED=settings.bias_corrected_kl,
            FORM=form,
            num_warps=num_warps,
        )
    return logp, entropy


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
    """See `terms.Backend`."""
    num_rows, vocabulary = products.shape
    if num_rows == 0:
        return
    tile, num_warps = gradient_tile(vocabulary)
    with on_device(products):
        shift, forbidden = logit_shift(head, products)
        gradient_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            targets,
            lse,
            entropy,
            grad_logp,
            grad_entropy,
            out,
            out.stride(0),
            vocabulary,
            LOG2E.value / head.temperature,
            1.0 / head.temperature,
            FORBIDDEN=forbidden,
            TILE=tile,
            num_warps=num_warps,
        )


def aot_variants() -> list[tuple[Any, dict[str, Any], dict[str, Any], int, int, bool]]:
    """What `aot` compiles: Janus's image vocabulary with its bias and its text vocabulary without, in two dtypes."""
    variants: list[tuple[Any, dict[str, Any], dict[str, Any], int, int, bool]] = []
    vector, number = "*fp32", "fp32"
    for dtype, itemsize in (("*bf16", 2), ("*fp32", 4)):
        for vocabulary, shift in ((16384, dtype), (102400, "constexpr")):
            row: dict[str, Any] = {"products": dtype, "stride": "i64", "shift": shift, "targets": "*i64"}
            scales = {"V": "i32", "scale": number}
            both = scales | {"inverse_temperature": number}
            form, warps = score_form(vocabulary, itemsize, False)
            signature = row | {"logp_out": vector, "entropy_out": vector, "lse_out": "*fp64"} | scales
            variants.append((score_rows_kernel, signature | {"FORM": "constexpr"}, {"FORM": form}, warps, 3, True))
            form, warps = loss_form(vocabulary, itemsize, False)
            signature = row | {"terms": Terms(vector, vector, vector, vector, "constexpr")}
            signature |= {"logp_out": vector, "entropy_out": vector} | both | {"numbers": Numbers(*[number] * 6)}
            constexprs = {"LOSS": 0, "BIAS_CORRECTED": False, "FORM": form}
            signature |= dict.fromkeys(constexprs, "constexpr")
            variants.append((loss_rows_kernel, signature, constexprs, warps, 3, True))
            tile, warps = gradient_tile(vocabulary)
            signature = row | {"lse": "*fp64", "entropy": vector, "grad_logp": vector, "grad_entropy": vector}
            signature |= {"out": dtype, "out_stride": "i64"} | both
            constexprs = {"FORBIDDEN": False, "TILE": tile}
            signature |= dict.fromkeys(constexprs, "constexpr")
            variants.append((gradient_rows_kernel, signature, constexprs, warps, 3, True))
    return variants


AOT = aot_variants()
