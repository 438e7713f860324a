"""Attention for packed sequences and for cached decoding, behind transformers' attention interface.

Any decoder of transformers runs on either layout: the layout object travels through the model's keyword arguments to
every attention layer, so neither masks nor caches of transformers are involved.  (Its own packed path leaks across
sequences unless `use_cache=False` and no mask is given; its DynamicCache copies all keys and values at every step.)

    hidden = decoder(inputs_embeds=..., position_ids=..., layout=PackedLayout(cu_seqlens), use_cache=False)

Dims: T packed tokens, B rows, H query heads, K key-value heads, E head size, C cache columns.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "syncr1"
_BUCKET = 16
"""Sequences whose lengths fall into the same multiple of this are padded to one length inside the attention only."""


class AttentionLayout(Protocol):
    """What an attention layer needs to know about where tokens lie."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries [B, H, N, E], keys and values [B, K, N, E] of the new tokens -> attended values [B, N, H, E]."""
        ...


class PackedLayout:
    """Causal attention within each sequence of one packed axis; nothing crosses a boundary.

    Args:
        cu_seqlens: [S+1] int32. Empty sequences are allowed.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        buckets = (lengths + _BUCKET - 1) // _BUCKET
        self._buckets: list[tuple[Tensor, Tensor]] = []
        for bucket in torch.unique(buckets[lengths > 0]).tolist():
            rows = (buckets == bucket).nonzero().squeeze(1)
            columns = torch.arange(int(lengths[rows].max()), device=cu_seqlens.device)
            real = columns[None, :] < lengths[rows, None]
            # Padding lies at the end of a row, where causality hides it; it points at the row's own first token.
            self._buckets.append((starts[rows, None] + columns[None, :] * real, real))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        del layer
        query_THE, key_TKE, value_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
        pieces, places = [], []
        for index, real in self._buckets:
            q, k, v = (x[index].transpose(1, 2) for x in (query_THE, key_TKE, value_TKE))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            pieces.append(out.transpose(1, 2)[real])
            places.append(index[real])
        order = torch.cat(places).argsort()
        return torch.cat(pieces)[order][None]


class KVCache:
    """Keys and values of a batch of rows, allocated once; columns are shared, validity is per row.

    A row ignores the columns where it had nothing to say (left padding, steps after its text ended), so rows of
    different lengths advance together without a host synchronisation.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_rows, num_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.zeros((num_rows, capacity), dtype=torch.bool, device=device)
        self.length = 0
        self._start = 0
        self._mask: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def extend(self, valid: Tensor) -> KVCache:
        """Opens the next columns for one forward pass. `valid`: [B, N] bool, True where the row has a token."""
        num_new = valid.shape[1]
        assert self.length + num_new <= self.capacity, f"cache of {self.capacity} columns is full at {self.length}"
        self._start, self.length = self.length, self.length + num_new
        self.valid[:, self._start : self.length] = valid
        columns = torch.arange(self.length, device=valid.device)
        queries = columns[self._start :]
        seen = self.valid[:, None, : self.length] & (columns[None, None, :] <= queries[None, :, None])
        # A padded query sees itself, because a softmax over nothing is NaN and would spread through its value.
        self._mask = (seen | (columns[None, None, :] == queries[None, :, None]))[:, None]
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.keys[layer, :, :, self._start : self.length] = key
        self.values[layer, :, :, self._start : self.length] = value
        keys, values = self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
        grouped = query.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    def rows(self, index: Tensor, capacity: int | None = None) -> KVCache:
        """A copy holding rows `index` [B'] int64 (repeats allowed), with room for `capacity` columns."""
        other = object.__new__(KVCache)
        capacity = capacity or self.capacity
        shape = (self.keys.shape[0], index.numel(), self.keys.shape[2], capacity, self.keys.shape[4])
        other.keys, other.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        other.valid = self.valid.new_zeros((index.numel(), capacity))
        other.length, other._start, other._mask = self.length, self._start, None
        used = slice(0, self.length)
        other.keys[:, :, :, used] = self.keys[:, index, :, used]
        other.values[:, :, :, used] = self.values[:, index, :, used]
        other.valid[:, used] = self.valid[index, used]
        return other

    def write_rows(self, index: Tensor, other: KVCache) -> None:
        """Overwrites rows `index` with those of `other`, which must have come equally far."""
        assert other.length == self.length
        used = slice(0, self.length)
        self.keys[:, index, :, used] = other.keys[:, :, :, used]
        self.values[:, index, :, used] = other.values[:, :, :, used]
        self.valid[index, used] = other.valid[:, used]

    def crop(self, length: int) -> None:
        """Forgets all columns from `length` on."""
        assert length <= self.length
        self.valid[:, length : self.length] = False
        self.length = length


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        raise ValueError(
            "syncr1 attention: expected layout=PackedLayout(...) or KVCache, got none; call the policy's `trunk`"
        )
    assert attention_mask is None, "the layout decides what is seen; a mask would be ignored"
    return layout.attend(cast(int, module.layer_idx), query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attention)
