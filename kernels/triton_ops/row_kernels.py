"""Rows of a chunk of logits in Triton: score, loss with gradient in place, gradient from scores.

    z = (product + shift) / τ,   logp = z_y − lse,   H = lse − Σ p z
    dL/dproduct_v = (g ([v = y] − p_v) − g_H p_v (log p_v + H)) / τ

over the ids of the row's support, where it has one.
One program per row. A short row stays in registers: one read, one write. A longer one is swept in tiles with running
sums per column; where it needs a second sweep, that goes backwards, so that it begins with what is still in L2. `shift`
is the bias, with -inf at forbidden ids. Source: online softmax (arXiv 1805.02867); Liger, QuACK.

Dims: `C` rows of a chunk, `V` vocabulary.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_math import (
    LN2,
    LOWEST,
    absorb,
    combine,
    entropy_of,
    is_one_id,
    keep_tile,
    keeps,
    load_logits,
    weights_of,
    whole_row,
)
from .token_math import token_gradient


class RowForm(NamedTuple):
    """What a launch is compiled for."""

    FORBIDDEN: Any
    """Some of `shift` is -inf."""
    RAGGED: Any
    """Rows begin at multiples of 16 bytes and end elsewhere."""
    RESIDENT: Any
    """One tile of one row holds the whole row."""
    TILE_ROWS: Any
    TILE_COLUMNS: Any


class Terms(NamedTuple):
    """Pointers to [C] float32; None where absent."""

    advantage: Any
    weight: Any
    old_logp: Any
    ref_logp: Any
    is_ratio: Any


class Numbers(NamedTuple):
    """Settings, as float32 arguments: changing one compiles nothing."""

    clip_low: Any
    clip_high: Any
    delta: Any
    beta: Any
    sapo_pos: Any
    sapo_neg: Any


@triton.jit
def row_statistics(row, shift, support, V, scale, FORM: tl.constexpr):
    """(weights where the row is resident, finite offset, total, weighted) of one row."""
    if FORM.RESIDENT:
        logits = load_logits(row, shift, tl.arange(0, FORM.TILE_COLUMNS), V, FORM.FORBIDDEN, FORM.RAGGED)
        weights, offset, total, weighted = whole_row(keep_tile(logits, support, 0, V), scale)
    else:
        tile = tl.arange(0, FORM.TILE_ROWS)[:, None] * FORM.TILE_COLUMNS + tl.arange(0, FORM.TILE_COLUMNS)[None, :]
        offsets = tl.full([FORM.TILE_COLUMNS], LOWEST, tl.float32)
        totals = tl.full([FORM.TILE_COLUMNS], 0, tl.float32)
        weighteds = tl.full([FORM.TILE_COLUMNS], 0, tl.float32)
        for start in range(0, V, FORM.TILE_ROWS * FORM.TILE_COLUMNS):
            logits = load_logits(row, shift, start + tile, V, FORM.FORBIDDEN, FORM.RAGGED)
            logits = keep_tile(logits, support, start, V)
            offsets, totals, weighteds = absorb(logits, scale, offsets, totals, weighteds)
        offset, total, weighted = combine(offsets, totals, weighteds)
        weights = total
    return weights, offset, total, weighted


@triton.jit
def load_target(row, shift, target, inside, V, FORBIDDEN: tl.constexpr):
    """One id's logit, -inf where it is forbidden or outside the support."""
    logit = load_logits(row, shift, target, V, FORBIDDEN, False)
    return logit if inside is None else tl.where(inside, logit, LOWEST)


@triton.jit
def load_tail(row, shift, support, V, FORBIDDEN: tl.constexpr):
    """The logits of `tail_ids`."""
    ids = tail_ids(row, V)
    logits = load_logits(row, shift, ids, V, FORBIDDEN, False)
    return logits if support is None else tl.where(keeps(support, ids, V), logits, LOWEST)


@triton.jit
def store_target(row, shift, target, inside, value, gradient, FORBIDDEN: tl.constexpr):
    """Writes the target id's gradient, `value` from the softmax and `gradient` of its own, over what the sweep wrote.

    One id apart is cheaper than a comparison at every id. An id that is forbidden or outside the support gets nothing.
    """
    if FORBIDDEN:
        gradient = tl.where(tl.load(shift + target).to(tl.float32) == LOWEST, 0.0, gradient)
    if inside is not None:
        gradient = tl.where(inside, gradient, 0.0)
    tl.debug_barrier()
    tl.store(row + target, (value + gradient).to(row.dtype.element_ty))


@triton.jit
def tail_ids(row, V):
    """The ids of a ragged row's last 16 bytes, which no store of whole 16 bytes may write."""
    PIECE: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    return (V // PIECE) * PIECE + tl.arange(0, PIECE)


@triton.jit
def store_part(row, ids, V, values, RAGGED: tl.constexpr):
    """Writes values at the ids of the row; of a ragged one all but those of `tail_ids`."""
    PIECE: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    end = (V // PIECE) * PIECE if RAGGED else V
    tl.store(row + ids, values.to(row.dtype.element_ty), mask=ids < end)


@triton.jit
def store_tail(row, V, values):
    """Writes values at `tail_ids`."""
    ids = tail_ids(row, V)
    tl.store(row + ids, values.to(row.dtype.element_ty), mask=ids < V)


@triton.jit
def store_zeros(row, V, TILE: tl.constexpr, RAGGED: tl.constexpr):
    ids = tl.arange(0, TILE)
    for start in range(0, V, TILE):
        store_part(row, start + ids, V, tl.zeros([TILE], tl.float32), RAGGED)
    if RAGGED:
        store_tail(row, V, tl.zeros_like(tail_ids(row, V)))


@triton.jit
def row_gradient(logp, index, terms, numbers, LOSS: tl.constexpr, BIAS_CORRECTED: tl.constexpr):
    """d loss / d logp of one row; exactly 0 at weight 0, whatever the other terms hold there."""
    weight = tl.load(terms.weight + index)
    old_logp = tl.load(terms.old_logp + index) if terms.old_logp is not None else logp
    ref_logp = tl.load(terms.ref_logp + index) if terms.ref_logp is not None else logp
    is_ratio = tl.load(terms.is_ratio + index) if terms.is_ratio is not None else 1.0
    _, gradient = token_gradient(
        logp,
        old_logp,
        terms.old_logp is not None,
        ref_logp,
        terms.ref_logp is not None,
        tl.load(terms.advantage + index),
        is_ratio,
        weight,
        LOSS,
        numbers.clip_low,
        numbers.clip_high,
        numbers.delta,
        numbers.beta,
        BIAS_CORRECTED,
        numbers.sapo_pos,
        numbers.sapo_neg,
    )
    return tl.where(weight == 0, 0.0, gradient)


@triton.jit
def score_rows_kernel(
    products,
    stride,
    shift,
    support,
    num_words,
    targets,
    logp_out,
    entropy_out,
    lse_out,
    V,
    scale,
    FORM: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = products + index * stride
    own = support + index * num_words if support is not None else None
    _, offset, total, weighted = row_statistics(row, shift, own, V, scale, FORM)
    log_total = tl.log2(total)
    target = tl.load(targets + index)
    inside = keeps(own, target, V) if support is not None else None
    target_logit = load_target(row, shift, target, inside, V, FORM.FORBIDDEN)
    logp = (tl.fma(target_logit, scale, -offset) - log_total) * LN2
    entropy = entropy_of(total, weighted)
    if support is not None:
        alone = inside & is_one_id(own, num_words, V)
        logp, entropy = tl.where(alone, 0.0, logp), tl.where(alone, 0.0, entropy)
    tl.store(logp_out + index, logp)
    tl.store(entropy_out + index, entropy)
    tl.store(lse_out + index, (offset.to(tl.float64) + log_total.to(tl.float64)) * LN2)


@triton.jit
def loss_rows_kernel(
    products,
    stride,
    shift,
    support,
    num_words,
    targets,
    terms,
    logp_out,
    entropy_out,
    V,
    scale,
    inverse_temperature,
    numbers,
    LOSS: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    FORM: tl.constexpr,
):
    TILE: tl.constexpr = FORM.TILE_ROWS * FORM.TILE_COLUMNS
    RAGGED: tl.constexpr = FORM.RAGGED
    index = tl.program_id(0).to(tl.int64)
    row = products + index * stride
    target = tl.load(targets + index)
    # Before the row is overwritten: the reductions below are barriers between this read and the writes.
    own = support + index * num_words if support is not None else None
    inside = keeps(own, target, V) if support is not None else None
    target_logit = load_target(row, shift, target, inside, V, FORM.FORBIDDEN)
    weights, offset, total, weighted = row_statistics(row, shift, own, V, scale, FORM)
    logp = (tl.fma(target_logit, scale, -offset) - tl.log2(total)) * LN2
    entropy = entropy_of(total, weighted)
    if support is not None:
        alone = inside & is_one_id(own, num_words, V)
        logp, entropy = tl.where(alone, 0.0, logp), tl.where(alone, 0.0, entropy)
    tl.store(logp_out + index, logp)
    tl.store(entropy_out + index, entropy)
    gradient = row_gradient(logp, index, terms, numbers, LOSS, BIAS_CORRECTED)
    if support is not None:
        gradient = tl.where(alone, 0.0, gradient)
    if gradient == 0:
        store_zeros(row, V, TILE, RAGGED)
    else:
        gradient *= inverse_temperature
        share = -gradient / total
        columns = tl.arange(0, TILE)
        if FORM.RESIDENT:
            store_part(row, columns, V, weights * share, RAGGED)
        else:
            num_tiles = tl.cdiv(V, TILE)
            for tile in range(num_tiles):
                ids = (num_tiles - 1 - tile) * TILE + columns
                logits = load_logits(row, shift, ids, V, FORM.FORBIDDEN, RAGGED)
                logits = keep_tile(logits, own, (num_tiles - 1 - tile) * TILE, V)
                again, _ = weights_of(logits, scale, offset)
                store_part(row, ids, V, again * share, RAGGED)
        if RAGGED:
            again, _ = weights_of(load_tail(row, shift, own, V, FORM.FORBIDDEN), scale, offset)
            store_tail(row, V, again * share)
        target_weight, _ = weights_of(target_logit, scale, offset)
        store_target(row, shift, target, inside, target_weight * share, gradient, FORM.FORBIDDEN)


@triton.jit
def softmax_part(logits, scale, offset, slope, level):
    """p (slope log2 p + level)."""
    probability, log2_probability = weights_of(logits, scale, offset)
    return probability * tl.fma(log2_probability, slope, level)


@triton.jit
def gradient_rows_kernel(
    products,
    stride,
    shift,
    support,
    num_words,
    targets,
    lse,
    entropy,
    grad_logp,
    grad_entropy,
    out,
    out_stride,
    V,
    scale,
    inverse_temperature,
    FORBIDDEN: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, out_row = products + index * stride, out + index * out_stride
    by_logp = tl.load(grad_logp + index) if grad_logp is not None else 0.0
    by_entropy = tl.load(grad_entropy + index) if grad_entropy is not None else 0.0
    own = support + index * num_words if support is not None else None
    target = tl.load(targets + index)
    inside = keeps(own, target, V) if support is not None else None
    if support is not None:
        alone = inside & is_one_id(own, num_words, V)
        by_logp, by_entropy = tl.where(alone, 0.0, by_logp), tl.where(alone, 0.0, by_entropy)
    if (by_logp == 0) & (by_entropy == 0):
        store_zeros(out_row, V, TILE, RAGGED)
    else:
        by_logp *= inverse_temperature
        by_entropy *= inverse_temperature
        exact = tl.load(lse + index) / LN2
        offset = exact.to(tl.float32)
        rest = (exact - offset).to(tl.float32)  # 2^-10 at logits of 8192; p is 2^-rest times what `offset` makes of it
        slope = -by_entropy * LN2
        level = tl.exp2(-rest) * (-(by_logp + by_entropy * tl.load(entropy + index)) - slope * rest)
        slope *= tl.exp2(-rest)
        target_logit = load_target(row, shift, target, inside, V, FORBIDDEN)
        # `out` may be `products`: every thread has read the target before any writes.
        tl.debug_barrier()
        columns = tl.arange(0, TILE)
        for start in range(0, V, TILE):
            logits = load_logits(row, shift, start + columns, V, FORBIDDEN, RAGGED)
            logits = keep_tile(logits, own, start, V)
            store_part(out_row, start + columns, V, softmax_part(logits, scale, offset, slope, level), RAGGED)
        if RAGGED:
            logits = load_tail(row, shift, own, V, FORBIDDEN)
            store_tail(out_row, V, softmax_part(logits, scale, offset, slope, level))
        value = softmax_part(target_logit, scale, offset, slope, level)
        store_target(out_row, shift, target, inside, value, by_logp, FORBIDDEN)
