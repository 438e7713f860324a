"""Launches the row kernels: how a row is cut, and what they compile to ahead of time.

Dims: `C` rows of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..support import num_words
from ..terms import ROW_LOSSES, Head, RowSettings, RowTerms
from .launching import on_device
from .row_kernels import (
    Numbers,
    RowForm,
    Terms,
    gradient_rows_kernel,
    loss_rows_kernel,
    score_rows_kernel,
)
from .row_math import LOG2E

SCORE_RESIDENT_IDS = 8192
"""Longest row that scoring holds in registers. It reads once in either form: the cut only balances occupancy."""
LOSS_RESIDENT_BYTES = 32768
"""Longest row that the loss holds in registers, to read it once; beyond, two programs do not fit a multiprocessor."""
STREAM_TILE = 8192
"""Ids of a step of the gradient sweep."""
STREAM_BYTES = 16384
"""Of a step of the others: four loads of 16 bytes for each of 256 threads, two for each of 512."""
SCORE_WARPS = 8
"""Of a longer row, one sweep: several programs share a multiprocessor and hide each other's memory latency."""
LOSS_WARPS = 16
"""Of a longer row, two sweeps: few rows in flight, so that the second one still finds them in L2."""
GRADIENT_WARPS = 8
GRADIENT_REGISTERS = {2: 80, 4: 112}
"""With a support, by bytes of an id; stated for the same reason as `REGISTERS`."""
REGISTERS = {"ragged": 128, "float32": 64, "support": 96, "float16": None}
"""Of the loss's full programs, one a multiprocessor or two, whose rows L2 still holds for the second sweep. Stated, or
ptxas spills a few bytes where it sees room for one more; two 16-bit rows it fits in by itself."""


class Cut(NamedTuple):
    """What a kernel is compiled for beside the settings. It depends on a row alone, not on the number of rows: a row's
    bits do not depend on its chunk."""

    vocabulary: int
    itemsize: int
    forbidden: bool = False
    ragged: bool = False
    support: bool = False

    @property
    def kind(self) -> str:
        """Of `REGISTERS`."""
        if self.ragged or self.itemsize == 4:
            return "ragged" if self.ragged else "float32"
        return "support" if self.support else "float16"


def row_form(cut: Cut, resident: bool, stream_warps: int) -> tuple[RowForm, int]:
    """The tiles of a row and its warps."""
    if resident:
        columns = max(triton.next_power_of_2(cut.vocabulary), 32)
        return RowForm(cut.forbidden, cut.ragged, True, 1, columns), max(1, columns // 1024)
    # Every lane reads 16 bytes along the row; the tile's rows then lie in the registers of one thread.
    columns = stream_warps * 32 * (16 // cut.itemsize)
    return RowForm(cut.forbidden, cut.ragged, False, STREAM_BYTES // (cut.itemsize * columns), columns), stream_warps


def score_form(cut: Cut) -> tuple[RowForm, int]:
    """See `row_form`."""
    return row_form(cut, cut.vocabulary <= SCORE_RESIDENT_IDS, SCORE_WARPS)


def loss_form(cut: Cut) -> tuple[RowForm, int]:
    """See `row_form`."""
    return row_form(cut, cut.vocabulary * cut.itemsize <= LOSS_RESIDENT_BYTES, LOSS_WARPS)


def gradient_tile(vocabulary: int) -> tuple[int, int]:
    """Ids per step, and warps."""
    tile = min(max(triton.next_power_of_2(vocabulary), 32), STREAM_TILE)
    return tile, max(1, tile * GRADIENT_WARPS // STREAM_TILE)


def is_ragged(*rows: Tensor) -> bool:
    """Rows begin at multiples of 16 bytes and end elsewhere. Of rows that begin anywhere single ids are read."""
    aligned = all(r.data_ptr() % 16 == 0 and (r.stride(0) % 16 == 0 or r.shape[0] == 1) for r in rows)
    return aligned and rows[0].shape[1] % 16 != 0


def prepared(head: Head, products: Tensor, *outputs: Tensor) -> tuple[Tensor | None, Cut]:
    """([V] what is added to the products, contiguous and where memory's 16 bytes begin; the cut)."""
    vocabulary, shift = products.shape[1], head.bias
    forbidden = head.forbidden is not None and head.forbidden.numel() > 0
    if head.forbidden is not None and forbidden:
        shift = products.new_zeros(vocabulary) if shift is None else shift.clone(memory_format=torch.contiguous_format)
        shift.index_fill_(0, head.forbidden, -torch.inf)
    elif shift is not None and (not shift.is_contiguous() or shift.data_ptr() % 16):
        shift = shift.clone(memory_format=torch.contiguous_format)
    ragged, truncated = is_ragged(products, *outputs), head.support is not None
    return shift, Cut(vocabulary, products.element_size(), forbidden, ragged, truncated)


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
        shift, cut = prepared(head, products)
        form, num_warps = score_form(cut)
        score_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            head.support,
            num_words(vocabulary),
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
        shift, cut = prepared(head, products)
        form, num_warps = loss_form(cut)
        loss_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            head.support,
            num_words(vocabulary),
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
            maxnreg=None if num_warps < LOSS_WARPS else REGISTERS[cut.kind],
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
        shift, cut = prepared(head, products, out)
        gradient_rows_kernel[(num_rows,)](
            products,
            products.stride(0),
            shift,
            head.support,
            num_words(vocabulary),
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
            FORBIDDEN=cut.forbidden,
            RAGGED=cut.ragged,
            TILE=tile,
            num_warps=num_warps,
            maxnreg=GRADIENT_REGISTERS[cut.itemsize] if cut.support and num_warps == GRADIENT_WARPS else None,
        )
