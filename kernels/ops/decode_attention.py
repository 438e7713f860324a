"""`prefix_decode_attention`: one decode step whose rows share prefixes: the members of a group read one stored prompt,
each its own answer.

    score_rl = scale · query_r · key_l,   output_r = Σ_l softmax_l(score_r) value_l,   l over the row's two spans

It writes into two of its arguments, has no gradient, and every backend serves it. Off the CPU nothing here reads a
tensor's values: the lengths stay on the device, so that the step runs inside a CUDA graph.

Dims: `R` rows, `Hq` query heads, `Hkv` key-value heads, `E` head width, `Np` prefix columns, `Nc` own columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import SMALL, check_float, checks_values, refuse
from ..dispatch import choose, module_of
from ..ranges import ATTENTION_SCALE
from ..register import fakes, implements, registered
from ..terms import DecodeStep

OP = "prefix_decode_attention"


def prefix_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    spans: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one new token per row to a prefix that rows may share and to the row's own tokens.

    Equivalent PyTorch, for row r with spans[r] = (p, n, o, m), after own_keys[:, o + m] = key[r], so with the values:
        keys = torch.cat([prefix_keys[:, p : p + n], own_keys[:, o : o + m + 1]], 1).repeat_interleave(Hq // Hkv, 0)
        values = torch.cat([prefix_values[:, p : p + n], own_values[:, o : o + m + 1]], 1).repeat_interleave(...)
        output[r] = (scale * keys @ query[r, :, :, None]).softmax(1).mT @ values

    Rows that read the same prefix should be neighbours: `native` then reads it once for many of them. Rows share an own
    span only where each other's new columns hold their keys and values already (several given tokens of one sequence,
    a row each). Rows of padding, whose output means nothing, may all name one dummy column with own length 0.

    Args:
        query: [R, Hq, E] float; Hq is a multiple of Hkv, and query head h reads key-value head h // (Hq // Hkv).
        key: [R, Hkv, E], of the new token; the dtype of all seven tensors is one.
        value: [R, Hkv, E], of the new token.
        prefix_keys: [Hkv, Np, E], all prefixes one after another, unit stride along E; Np may be 0.
        prefix_values: [Hkv, Np, E], likewise.
        own_keys: [Hkv, Nc, E], unit stride along E; overwritten with `key` at each row's new column.
        own_values: [Hkv, Nc, E], likewise with `value`.
        spans: [R, 4] int64: prefix start, prefix length, own start, own length before this token.
        scale: of the scores, finite and > 0; None is E ** -0.5.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        [R, Hq, E] in the dtype of `query`, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, stride or device is out of place, or, where values are checked (CPU tensors, or
            SYNCR1_CHECKS=always), a span is out of range.
        RuntimeError: an argument requires a gradient while gradients are recorded; the op has none.

    Source: Hydragen (arXiv 2402.05099); FlashAttention's online softmax (arXiv 2205.14135).
    """
    ATTENTION_SCALE.check(OP, "scale", scale)
    tensors = (query, key, value, prefix_keys, prefix_values, own_keys, own_values, spans)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{OP}: no argument may require a gradient, as the op has none, got one that does; "
            "decode under torch.no_grad(), or score the tokens with shared_prefix_attention"
        )
    _check_shapes(tensors)
    factor = query.shape[2] ** -0.5 if scale is None else float(scale)
    step = DecodeStep(*tensors, factor, choose(OP, backend, query))  # the others are alike
    # Past torch's dispatcher where nobody could tell.
    if torch.compiler.is_compiling() or type(query) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        output: Tensor = registered.prefix_decode_attention(*step)
        return output
    return decode(step)


@implements(OP, DecodeStep, "Tensor")
def decode(step: DecodeStep) -> Tensor:
    """[R, Hq, E]; own_keys and own_values hold the new token afterwards."""
    query, key, value, prefix_keys, _, own_keys, own_values, spans, _, backend = step
    if checks_values(spans):
        _check_spans(spans, prefix_keys.shape[1], own_keys.shape[1])
    if query.shape[0] == 0:
        return query.new_empty(query.shape)
    dense = step._replace(
        query=_unit_stride(query), key=_unit_stride(key), value=_unit_stride(value), spans=spans.contiguous()
    )
    output: Tensor = module_of(backend).prefix_decode_attention(dense)
    if not own_keys.is_inference():  # autograd elsewhere may hold them
        torch.autograd.graph.increment_version((own_keys, own_values))
    return output


@fakes(OP, DecodeStep)
def _(step: DecodeStep) -> Tensor:
    return step.query.new_empty(step.query.shape)


def _check_shapes(tensors: tuple[Tensor, ...]) -> None:
    query, key, value, prefix_keys, prefix_values, own_keys, own_values, spans = tensors
    check_float(OP, "query", query)
    if query.dim() != 3 or own_keys.dim() != 3 or prefix_keys.dim() != 3:
        got = f"{list(query.shape)}, {list(prefix_keys.shape)} and {list(own_keys.shape)}"
        refuse(
            OP, "query, prefix_keys and own_keys", "[R, Hq, E], [Hkv, Np, E] and [Hkv, Nc, E]", got, "one token a row"
        )
    num_rows, num_heads, width = query.shape
    num_kv_heads = own_keys.shape[0]
    if num_kv_heads == 0 or width == 0 or num_heads % num_kv_heads:
        got = f"{num_heads} of {num_kv_heads}, width {width}"
        refuse(OP, "query heads", "a multiple of the key-value heads, of width > 0", got, "is query [R, Hq, E]?")
    new = (num_rows, num_kv_heads, width)
    prefix, own = (num_kv_heads, prefix_keys.shape[1], width), (num_kv_heads, own_keys.shape[1], width)
    caches = (
        ("prefix_keys", prefix_keys, prefix),
        ("prefix_values", prefix_values, prefix),
        ("own_keys", own_keys, own),
        ("own_values", own_values, own),
    )
    device, dtype = query.device, query.dtype
    for name, tensor, shape in (("key", key, new), ("value", value, new), *caches):
        if tensor.shape != shape:
            refuse(OP, name, list(shape), list(tensor.shape), "heads lead in the caches, rows in query, key and value")
        if tensor.dtype != dtype:
            refuse(OP, f"{name}.dtype", dtype, tensor.dtype, "keep the caches in the model's dtype")
        if tensor.device != device:
            refuse(OP, f"{name}.device", device, tensor.device, "all tensors must be on one device; use .to(device)")
    for name, tensor, _ in caches:
        if tensor.stride(2) != 1 and width > 1 and tensor.numel():
            refuse(OP, f"{name}.stride(2)", 1, tensor.stride(2), "store the caches as [Hkv, columns, E]")
    if spans.shape != (num_rows, 4) or spans.dtype != torch.int64:
        got = f"{list(spans.shape)} {spans.dtype}"
        refuse(OP, "spans", f"[{num_rows}, 4] int64", got, "prefix start, prefix length, own start, own length per row")
    if spans.device != device:
        refuse(OP, "spans.device", device, spans.device, "move it with .to(device), outside of a CUDA graph")


def _unit_stride(values: Tensor) -> Tensor:
    return values if values.stride(2) == 1 else values.contiguous()


def _check_spans(spans: Tensor, num_prefix: int, num_own: int) -> None:
    """Every row's prefix lies within the prefixes, its own tokens and the new column within the own columns."""
    if spans.numel() > SMALL:
        start, length, own_start, own_length = spans.unbind(1)
        own_end = own_start + own_length
        bad = (spans < 0).any(1) | (start + length > num_prefix) | (own_end >= num_own)
        row = int(bad.int().argmax())
        if not bool(bad[row]):
            return
    else:
        wrong = [
            index
            for index, (start, length, own_start, own_length) in enumerate(spans.tolist())
            if min(start, length, own_start, own_length) < 0
            or start + length > num_prefix
            or own_start + own_length >= num_own
        ]
        if not wrong:
            return
        row = wrong[0]
    expected = f"within {num_prefix} prefix columns and, with the new token, {num_own} own columns"
    remedy = "give the row a longer own span, or one dummy column and length 0 where it is padding"
    refuse(OP, f"spans[{row}]", expected, spans[row].tolist(), remedy)
