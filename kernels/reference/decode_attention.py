"""One decode step over a shared prefix in plain PyTorch: row by row, the row's columns cut out and attended to.

Off the CPU the lengths cannot be read without a wait: every row looks at all columns through a mask, which is slow.

Dims: `R` rows, `Hq` query heads, `H` key-value heads, `M` query heads of one of them, `E` head width, `L` columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import DecodeStep
from .logp import accumulator


def prefix_decode_attention(step: DecodeStep) -> Tensor:
    """See `syncr1.kernels.api.prefix_decode_attention`; [R, Hq, E], any float dtype, any strides."""
    query, key, value, prefix_keys, prefix_values, own_keys, own_values, spans, scale, _ = step
    new_column_R = spans[:, 2] + spans[:, 3]
    own_keys.index_copy_(1, new_column_R, key.transpose(0, 1))
    own_values.index_copy_(1, new_column_R, value.transpose(0, 1))
    read = _cut_out if spans.device.type == "cpu" else _masked
    dtype, num_kv_heads = accumulator(query.dtype), own_keys.shape[0]
    rows = []
    for query_QE, span in zip(query, spans, strict=True):
        keys_HLE, values_HLE, keep_L = read(prefix_keys, prefix_values, own_keys, own_values, span)
        query_HME = query_QE.to(dtype).unflatten(0, (num_kv_heads, -1))
        scores_HML = (query_HME @ keys_HLE.to(dtype).mT) * scale
        if keep_L is not None:
            scores_HML = scores_HML.masked_fill(~keep_L, -torch.inf)
        rows.append((scores_HML.softmax(dim=-1) @ values_HLE.to(dtype)).flatten(0, 1))
    return torch.stack(rows).to(query.dtype)


def _cut_out(
    prefix_keys: Tensor, prefix_values: Tensor, own_keys: Tensor, own_values: Tensor, span: Tensor
) -> tuple[Tensor, Tensor, None]:
    """(keys [H, L, E], values [H, L, E], None): the L columns of one row."""
    start, length, own_start, own_length = span.tolist()
    prefix, own = slice(start, start + length), slice(own_start, own_start + own_length + 1)
    keys = torch.cat([prefix_keys[:, prefix], own_keys[:, own]], dim=1)
    return keys, torch.cat([prefix_values[:, prefix], own_values[:, own]], dim=1), None


def _masked(
    prefix_keys: Tensor, prefix_values: Tensor, own_keys: Tensor, own_values: Tensor, span: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys [H, L, E], values [H, L, E], keep [L]): all columns there are, those of other rows masked."""
    start, length, own_start, own_length = span.unbind()
    prefix = torch.arange(prefix_keys.shape[1], device=span.device) - start
    own = torch.arange(own_keys.shape[1], device=span.device) - own_start
    keep_L = torch.cat([(prefix >= 0) & (prefix < length), (own >= 0) & (own <= own_length)])
    # Another row's values may be NaN, which no probability of 0 would hide.
    values = torch.cat([prefix_values, own_values], dim=1).masked_fill(~keep_L[:, None], 0)
    return torch.cat([prefix_keys, own_keys], dim=1), values, keep_L
