"""Variable-length attention on the CPU: torch's dense flash kernel over batches of segments of equal length.

Adjacent segments of equal length are a view; short ones of nearly equal length are copied together and padded at their
ends, where causality hides the padding from real queries.  A padded query's log-sum-exp is set to infinity in the
backward, so that its probabilities are 0 whatever its scores are.  Grouped query heads are the kernel's own matter.

Dims: `N` queries, `M` keys, `B` segments of a batch, `L` padded length, `H` query heads, `K` key-value heads, `E` head
size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .varlen import Bucket, Run, VarlenCall

Three = tuple[Tensor, Tensor, Tensor]
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _batch(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """Rows of [N, H, E] or [N, H] as a batch [B, H, L, E] or [B, H, L], a view."""
    row, head, *last = x.stride()
    shape = (count, x.shape[1], length, *x.shape[2:])
    return x.as_strided(shape, (length * row, head, row, *last), x.storage_offset() + start * row)


def _rows(batch: Tensor) -> Tensor:
    """[B, H, L, …] → [B * L, H, …]; a view of what the kernels return, which is stored so."""
    return batch.transpose(1, 2).flatten(0, 1)


def _gathered(x: Tensor, bucket: Bucket) -> Tensor:
    """[N, H, …] → [B, H, L, …], a copy."""
    return x.index_select(0, bucket.rows).unflatten(0, (bucket.num_segments, bucket.length)).transpose(1, 2)


def _fill(x: Tensor, slices: tuple[tuple[int, int], ...], value: float) -> None:
    for start, end in slices:
        x[start:end] = value


def _covers(call: VarlenCall) -> bool:
    """One view is the whole call: what the kernel returns is the result."""
    ends = [(run.query_end - run.query, run.key_end - run.key) for run in call.runs]
    return ends == [(call.num_queries, call.num_keys)]


def _forward_run(q: Tensor, k: Tensor, v: Tensor, run: Run, causal: bool, scale: float) -> list[Tensor]:
    q_BHLE = _batch(q, run.query, run.num_segments, run.query_length)
    k_BKLE, v_BKLE = (_batch(x, run.key, run.num_segments, run.key_length) for x in (k, v))
    return [_rows(x) for x in _forward(q_BHLE, k_BKLE, v_BKLE, 0.0, causal, scale=scale)]


def forward(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, H, E], k and v [M, K, E], last strides 1 → output [N, H, E], log-sum-exp [N, H]."""
    if _covers(call):
        out, lse = _forward_run(q, k, v, call.runs[0], call.causal, scale)
        return out, lse
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for run in call.runs:
        rows = slice(run.query, run.query_end)
        out[rows], lse[rows] = _forward_run(q, k, v, run, call.causal, scale)
    for bucket in call.buckets:
        q_B, k_B, v_B = (_gathered(x, bucket) for x in (q, k, v))
        for whole, part in zip((out, lse), _forward(q_B, k_B, v_B, 0.0, call.causal, scale=scale), strict=True):
            _put(whole, _rows(part), bucket)
    _fill(out, call.blind_queries, 0.0)
    _fill(lse, call.blind_queries, -math.inf)
    return out, lse


def _backward_run(query_side: tuple[Tensor, ...], k: Tensor, v: Tensor, run: Run, causal: bool, scale: float) -> Three:
    grad_B, q_B, out_B, lse_B = (_batch(x, run.query, run.num_segments, run.query_length) for x in query_side)
    k_B, v_B = (_batch(x, run.key, run.num_segments, run.key_length) for x in (k, v))
    dq, dk, dv = _backward(grad_B, q_B, k_B, v_B, out_B, lse_B, 0.0, causal, scale=scale)
    return _rows(dq), _rows(dk), _rows(dv)


def _backward_bucket(
    query_side: tuple[Tensor, ...], k: Tensor, v: Tensor, bucket: Bucket, causal: bool, scale: float
) -> Three:
    grad, q, out, lse = query_side
    lse_rows = lse.index_select(0, bucket.rows)
    if bucket.padding is not None:
        lse_rows.masked_fill_(bucket.padding, math.inf)
    lse_B = lse_rows.unflatten(0, (bucket.num_segments, bucket.length)).transpose(1, 2)
    grad_B, q_B, k_B, v_B, out_B = (_gathered(x, bucket) for x in (grad, q, k, v, out))
    dq, dk, dv = _backward(grad_B, q_B, k_B, v_B, out_B, lse_B, 0.0, causal, scale=scale)
    return _rows(dq), _rows(dk), _rows(dv)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall, scale: float
) -> Three:
    """Gradients of q [N, H, E], k and v [M, K, E]; all inputs with last strides 1."""
    query_side = grad, q, out, lse
    if _covers(call):
        return _backward_run(query_side, k, v, call.runs[0], call.causal, scale)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for run in call.runs:
        rows, keys = slice(run.query, run.query_end), slice(run.key, run.key_end)
        dq[rows], dk[keys], dv[keys] = _backward_run(query_side, k, v, run, call.causal, scale)
    for bucket in call.buckets:
        parts = _backward_bucket(query_side, k, v, bucket, call.causal, scale)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _put(whole, part, bucket)
    _fill(dq, call.blind_queries, 0.0)
    _fill(dk, call.blind_keys, 0.0)
    _fill(dv, call.blind_keys, 0.0)
    return dq, dk, dv


def _put(whole: Tensor, part: Tensor, bucket: Bucket) -> None:
    """Rows of a bucket back to where they came from, padding left out."""
    whole.index_copy_(0, bucket.targets, part if bucket.padding is None else part.index_select(0, bucket.real))
