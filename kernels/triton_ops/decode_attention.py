"""One decode step over a shared prefix in Triton: one launch, one program per row, key-value head and four query heads.

    score_j = scale · query · key_j,   output = Σ_j 2^(score_j − top) value_j / Σ_j 2^(score_j − top)

The bounds are read on the device. Each lane of a block of columns keeps a softmax of its own, and they are merged once
at the end: no sum in the loop crosses warps. The new token's key and value come from registers and are written to the
caches beside; rows of a prefix find it in L2. `syncr1.kernels.reference.decode_attention` is the specification.
Source: FlashAttention's online softmax (arXiv 2205.14135); FlashDecoding's partial softmaxes.

Dims: `R` rows, `M` query heads of one key-value head, `E` head width, `N` columns of a block.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import DecodeStep
from .launching import on_device
from .row_math import LOG2E

FLOOR = tl.constexpr(-1e30)
"""A maximum before any score: below every real one, and finite, so that it can be subtracted from itself."""
STAGES = tl.constexpr(4)
WARPS = 8
MAX_HEADS = 4
"""Query heads of one program; more would not fit its registers, and read the keys again, from L2."""
MAX_REGISTERS = 248
TILE = 2048
"""Keys held at once, in elements: 8 for each of 256 threads, which bfloat16 reads in 16 bytes."""


class Strides(NamedTuple):
    """In elements; the last dimension's are 1."""

    query_row: Any
    query_head: Any
    key_row: Any
    key_head: Any
    value_row: Any
    value_head: Any
    prefix_key_head: Any
    prefix_key_column: Any
    prefix_value_head: Any
    prefix_value_column: Any
    own_key_head: Any
    own_key_column: Any
    own_value_head: Any
    own_value_column: Any


class DecodeForm(NamedTuple):
    """What is known when the kernel is compiled; lengths are not."""

    M: Any
    E: Any
    HEADS: Any
    """Query heads of a program, a power of two."""
    WIDTH: Any
    """E, likewise."""
    COLUMNS: Any


@triton.jit
def attend(query, top, sums, outputs, keys, values, key_stride, value_stride, length, FORM: tl.constexpr):
    """The softmax of every lane, [M, N], after `length` more columns; M is left out where it is 1."""
    e_E = tl.arange(0, FORM.WIDTH)
    # num_stages: the next blocks are on their way from memory while this one is added.
    for first in tl.range(0, length, FORM.COLUMNS, num_stages=STAGES):
        column_N = first + tl.arange(0, FORM.COLUMNS)
        inside_N = column_N < length
        mask_NE = inside_N[:, None] & (e_E < FORM.E)[None, :]
        key_NE = tl.load(keys + column_N[:, None] * key_stride + e_E[None, :], mask=mask_NE, other=0.0)
        value_NE = tl.load(values + column_N[:, None] * value_stride + e_E[None, :], mask=mask_NE, other=0.0)
        score = tl.sum(tl.expand_dims(query, -2) * key_NE.to(tl.float32), axis=-1)
        score = tl.where(inside_N, score, float("-inf"))
        higher = tl.maximum(top, score)
        weight = tl.exp2(score - higher)
        factor = tl.exp2(top - higher)
        sums = sums * factor + weight
        outputs = outputs * tl.expand_dims(factor, -1) + tl.expand_dims(weight, -1) * value_NE.to(tl.float32)
        top = higher
    return top, sums, outputs


@triton.jit
def decode_kernel(
    query,
    key,
    value,
    prefix_keys,
    prefix_values,
    own_keys,
    own_values,
    spans,
    out,
    num_rows,
    num_kv_heads,
    scale,
    strides,
    FORM: tl.constexpr,
):
    # Rows change fastest: those that share a prefix read it at about the same time.
    row = (tl.program_id(0) % num_rows).to(tl.int64)
    head = (tl.program_id(0) // num_rows % num_kv_heads).to(tl.int64)
    part = tl.program_id(0) // (num_rows * num_kv_heads)
    prefix_start, prefix_length = tl.load(spans + row * 4), tl.load(spans + row * 4 + 1)
    own_start, own_length = tl.load(spans + row * 4 + 2), tl.load(spans + row * 4 + 3)
    e_E = tl.arange(0, FORM.WIDTH)
    inside_E = e_E < FORM.E

    new_key_E = tl.load(key + row * strides.key_row + head * strides.key_head + e_E, mask=inside_E, other=0.0)
    new_value_E = tl.load(value + row * strides.value_row + head * strides.value_head + e_E, mask=inside_E, other=0.0)
    keys = own_keys + head * strides.own_key_head + own_start * strides.own_key_column
    values = own_values + head * strides.own_value_head + own_start * strides.own_value_column
    if part == 0:
        tl.store(keys + own_length * strides.own_key_column + e_E, new_key_E, mask=inside_E)
        tl.store(values + own_length * strides.own_value_column + e_E, new_value_E, mask=inside_E)

    query_at = query + row * strides.query_row + head * FORM.M * strides.query_head
    out_at = out + (row * num_kv_heads + head) * FORM.M * FORM.E
    if FORM.M == 1:
        query_at, out_at, inside = query_at + e_E, out_at + e_E, inside_E
        top = tl.full([FORM.COLUMNS], FLOOR, tl.float32)
        outputs = tl.full([FORM.COLUMNS, FORM.WIDTH], 0, tl.float32)
    else:
        m_M = part * FORM.HEADS + tl.arange(0, FORM.HEADS)
        query_at = query_at + m_M[:, None] * strides.query_head + e_E[None, :]
        out_at = out_at + m_M[:, None] * FORM.E + e_E[None, :]
        inside = (m_M < FORM.M)[:, None] & inside_E[None, :]
        top = tl.full([FORM.HEADS, FORM.COLUMNS], FLOOR, tl.float32)
        outputs = tl.full([FORM.HEADS, FORM.COLUMNS, FORM.WIDTH], 0, tl.float32)
    scaled = tl.load(query_at, mask=inside, other=0.0).to(tl.float32) * scale
    top, sums, outputs = attend(
        scaled,
        top,
        tl.zeros_like(top),
        outputs,
        prefix_keys + head * strides.prefix_key_head + prefix_start * strides.prefix_key_column,
        prefix_values + head * strides.prefix_value_head + prefix_start * strides.prefix_value_column,
        strides.prefix_key_column,
        strides.prefix_value_column,
        prefix_length,
        FORM,
    )
    top, sums, outputs = attend(
        scaled, top, sums, outputs, keys, values, strides.own_key_column, strides.own_value_column, own_length, FORM
    )

    new_score = tl.sum(scaled * new_key_E.to(tl.float32), axis=-1)
    highest = tl.maximum(tl.max(top, axis=-1), new_score)
    factor, new_weight = tl.exp2(top - tl.expand_dims(highest, -1)), tl.exp2(new_score - highest)
    total = tl.sum(sums * factor, axis=-1) + new_weight
    output = tl.sum(outputs * tl.expand_dims(factor, -1), axis=-2)
    output += tl.expand_dims(new_weight, -1) * new_value_E.to(tl.float32)
    tl.store(out_at, (output / tl.expand_dims(total, -1)).to(out.dtype.element_ty), mask=inside)


def decode_form(group: int, width: int) -> tuple[DecodeForm, int]:
    """The cut of a program's work and its warps, which depend on the model alone: a row's result never on its batch.

    Products of several query heads with one key are held for each: half of the columns then, and half of the warps, so
    that a thread still reads 16 bytes.
    """
    heads, padded = min(triton.next_power_of_2(group), MAX_HEADS), triton.next_power_of_2(width)
    share = 1 if group == 1 else 2
    return DecodeForm(group, width, heads, padded, max(TILE // (share * padded), 4)), WARPS // share


def prefix_decode_attention(step: DecodeStep) -> Tensor:
    """See `terms.Backend`."""
    query, spans = step.query, step.spans
    num_rows, num_heads, width = query.shape
    num_kv_heads = step.own_keys.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tensors = step[:7]  # those before the spans
    form, num_warps = decode_form(num_heads // num_kv_heads, width)
    strides = Strides(*(stride for tensor in tensors for stride in tensor.stride()[:2]))
    with on_device(query):
        decode_kernel[(num_rows * num_kv_heads * triton.cdiv(form.M, form.HEADS),)](
            *tensors,
            spans,
            out,
            num_rows,
            num_kv_heads,
            step.scale * LOG2E.value,
            strides,
            FORM=form,
            num_warps=num_warps,
            # Stated, or ptxas spills a few bytes of several heads' sums to fit in one program more.
            maxnreg=None if form.M == 1 else MAX_REGISTERS,
        )
    return out
