"""Registered op `syncr1::prefix_decode_attention`: writes into two of its arguments, has no gradient, every backend.

Dims: `R` rows, `Hq` query heads, `Hkv` key-value heads, `E` head width, `Np` prefix columns, `Nc` own columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import SMALL, checks_values, refuse
from ..dispatch import module_of
from .register import fakes, implements, registered

OP = "prefix_decode_attention"


@implements(
    OP,
    (
        "(Tensor query, Tensor key, Tensor value, Tensor prefix_keys, Tensor prefix_values, Tensor(a!) own_keys,"
        " Tensor(b!) own_values, Tensor spans, float scale, str backend) -> Tensor"
    ),
)
def prefix_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    spans: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    """[R, Hq, E]; own_keys and own_values hold the new token afterwards."""
    if checks_values(spans):
        _check_spans(spans, prefix_keys.shape[1], own_keys.shape[1])
    if query.shape[0] == 0:
        return query.new_empty(query.shape)
    output: Tensor = module_of(backend).prefix_decode_attention(
        _unit_stride(query), _unit_stride(key), _unit_stride(value), prefix_keys, prefix_values, own_keys, own_values,
        spans.contiguous(), scale,
    )  # fmt: skip
    if not own_keys.is_inference():  # autograd elsewhere may hold them
        torch.autograd.graph.increment_version((own_keys, own_values))
    return output


@fakes(OP)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    spans: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    return query.new_empty(query.shape)


def run(query: Tensor, *others: Tensor | float | str) -> Tensor:
    """`torch.ops.syncr1.prefix_decode_attention`, past torch's dispatcher where nobody could tell."""
    if torch.compiler.is_compiling() or type(query) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
        output: Tensor = registered.prefix_decode_attention(query, *others)
        return output
    return prefix_decode_attention(query, *others)  # type: ignore[arg-type]


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
