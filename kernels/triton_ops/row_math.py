"""Softmax statistics of rows of logits, in base 2: what the row kernels and the sampler share.

    w_v = 2^(scale z_v − offset),   offset = scale max z,   scale = log2(e) / temperature
    total = Σ w,   weighted = Σ w log2 w
    logp_v = ln 2 (log2 w_v − log2 total),   H = ln 2 (log2 total − weighted / total)

`offset` is rounded once and then used everywhere, so its rounding cancels, as long as 2 to it is a float32: up to
scale |max z| = 2³⁰ it is at most 2⁶. Both terms of H are ≥ 0, so nothing is lost where the logits are large. Logits of
−inf are legal: their w is exactly 0. Only `tl.fma` forms an exponent: two sweeps over one row give the same bits
whatever the compiler contracts.

Dims: `V` vocabulary.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
EXPONENT_FLOOR = tl.constexpr(-200.0)
"""2 to it is 0 in float32: turns 0 · (−inf) into 0."""
LOWEST = tl.constexpr(float("-inf"))
WORD = tl.constexpr(32)
"""Ids of a word of a support (`kernels/support.py`)."""
COUNTED_WORDS = tl.constexpr(2048)
"""Words of a step of `is_one_id`."""


@triton.jit
def readable(pointer, V, RAGGED: tl.constexpr):
    """How many ids of a row may be read: of a RAGGED one the 16 bytes that hold its last id are read as a whole.

    They may be another tensor's, and are not looked at; no page ends inside them, since the row begins at a multiple of
    16 bytes. A mask that is cut elsewhere would make every load of the row one of single ids.
    """
    PIECE: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    return tl.cdiv(V, PIECE) * PIECE if RAGGED else V


@triton.jit
def load_logits(row, shift, ids, V, FORBIDDEN: tl.constexpr, RAGGED: tl.constexpr):
    """Products + shift in float32; -inf outside the row and where `shift` is -inf (a forbidden id)."""
    inside = ids < readable(row, V, RAGGED)
    # Past L1, which is left to the shift that all rows share.
    logits = tl.load(row + ids, mask=inside, other=LOWEST, cache_modifier=".cg").to(tl.float32)
    if shift is not None:
        inside = ids < readable(shift, V, RAGGED)
        added = tl.load(shift + ids, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        shifted = logits + added
        # Chosen, not added: a NaN or +inf product of a forbidden id must not reach the row.
        logits = tl.where(added == LOWEST, LOWEST, shifted) if FORBIDDEN else shifted
    return tl.where(ids < V, logits, LOWEST) if RAGGED else logits


@triton.jit
def keeps(support, ids, V):
    """Whether the row's support holds these ids."""
    words = tl.load(support + ids // WORD, mask=ids < V, other=0)
    return ((words >> (ids % WORD)) & 1) != 0


@triton.jit
def keep_tile(logits, support, first, V):
    """-inf at those of the ids first, first + 1, … (a multiple of 32) that the row's support leaves out.

    A word is read once and spread over its 32 ids: the loads of the logits stay ones of 16 bytes.
    """
    if support is not None:
        index = first // WORD + tl.arange(0, logits.numel // WORD)
        words = tl.load(support + index, mask=index * WORD < V, other=0)
        bits = (words[:, None] >> tl.arange(0, WORD)[None, :]) & 1
        logits = tl.where(tl.reshape(bits, logits.shape) != 0, logits, LOWEST)
    return logits


@triton.jit
def is_one_id(support, num_words, V):
    """The row's support holds one id: its log-probability, entropy and gradient are 0 to the last bit."""
    counts = tl.zeros([COUNTED_WORDS], tl.int32)
    for start in range(0, num_words, COUNTED_WORDS):
        index = start + tl.arange(0, COUNTED_WORDS)
        words = tl.load(support + index, mask=index < num_words, other=0)
        left = V - index * WORD  # bits from V on mean nothing
        words = tl.where(left < WORD, words & ((1 << tl.maximum(left, 0)) - 1), words)
        counts += tl.where(words == 0, 0, tl.where((words & (words - 1)) == 0, 1, 2))
    return tl.sum(counts) == 1


@triton.jit
def finite(offset):
    """An offset that can be subtracted: 0 where there is nothing but -inf."""
    return tl.where(offset == LOWEST, 0.0, offset)


@triton.jit
def weights_of(logits, scale, offset):
    """(w, log2 w bounded so that w log2 w is 0 where w is) against a finite offset."""
    exponent = tl.fma(logits, scale, -offset)
    return tl.exp2(exponent), tl.maximum(exponent, EXPONENT_FLOOR)


@triton.jit
def moved(total, weighted, offset, new_offset):
    """Sums taken against `offset`, as they are against the finite `new_offset` ≥ `offset`."""
    distance = offset - new_offset
    factor = tl.exp2(distance)
    return total * factor, (weighted + tl.maximum(distance, EXPONENT_FLOOR) * total) * factor


@triton.jit
def absorb(logits, scale, offset, total, weighted):
    """Running sums per column of [rows, columns] tiles: no thread waits for another until the row is over."""
    new_offset = tl.maximum(offset, tl.max(logits, axis=0) * scale)
    base = finite(new_offset)
    total, weighted = moved(total, weighted, offset, base)
    weights, exponents = weights_of(logits, scale, base[None, :])
    return new_offset, total + tl.sum(weights, axis=0), weighted + tl.sum(weights * exponents, axis=0)


@triton.jit
def combine(offset, total, weighted):
    """The running sums of all columns as those of the row: (finite offset, total, weighted)."""
    base = finite(tl.max(offset))
    total, weighted = moved(total, weighted, offset, base)
    return base, tl.sum(total), tl.sum(weighted)


@triton.jit
def whole_row(logits, scale):
    """(weights, finite offset, total, weighted) of a row, or a part of one, held in registers."""
    base = finite(tl.max(logits) * scale)
    weights, exponents = weights_of(logits, scale, base)
    return weights, base, tl.sum(weights), tl.sum(weights * exponents)


@triton.jit
def entropy_of(total, weighted):
    """Nats."""
    return (tl.log2(total) - weighted / total) * LN2
