"""Keys and values of trajectories under way: a prompt's once, what a row adds to it apart.

A row of the cache is one decoding sequence: a group's member, or its classifier-free twin.  It attends to two spans of
columns: its prompt's, which all members share, and its own.  Spans are plain offsets into two stores, so rows have
capacities of their own, nothing is padded, and no key is ever moved.

Dims: P prompts, R rows, N new tokens, H query heads, K key-value heads, E head size, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from syncr1.kernels.api import (
    SharedPrefixLayout,
    cached_prefix_attention,
    prefix_decode_attention,
    shared_prefix_attention,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a decoder keeps of one token."""

    num_layers: int
    num_heads: int
    """Key-value heads."""
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def num_bytes(self, num_columns: int) -> int:
        """Bytes of the keys and values of that many tokens, all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * num_columns * self.dtype.itemsize


@dataclass(slots=True)
class Rows:
    """Where rows stand. Everything lives on the device, one entry per row."""

    spans: Tensor
    """[R, 4] int64: prompt start, prompt length, own start, own length, as `prefix_decode_attention` takes them."""
    position: Tensor
    """[R] int64: position id of the next token."""
    hidden: Tensor
    """[R, D]: the hidden state that predicts the next token."""

    @classmethod
    def behind(cls, prompt_start: Tensor, prompt_length: Tensor, own_start: Tensor, hidden: Tensor) -> Rows:
        """Rows that hold nothing but their prompts, [R] each; `hidden` [R, D] is their prompts' last."""
        spans = torch.stack([prompt_start, prompt_length, own_start, torch.zeros_like(own_start)], 1)
        return cls(spans, prompt_length.clone(), hidden)

    def __len__(self) -> int:
        return self.position.shape[0]

    @property
    def own_start(self) -> Tensor:
        """[R] int64, a view: first column of what the row adds to its prompt."""
        return self.spans[:, 2]

    @property
    def own_length(self) -> Tensor:
        """[R] int64, a view: columns that it has added."""
        return self.spans[:, 3]

    def own_spans(self) -> list[tuple[int, int]]:
        """[R] (start, length) of their own columns, on the host."""
        return list(zip(self.own_start.tolist(), self.own_length.tolist(), strict=True))

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.spans, self.position, self.hidden

    def part(self, which: slice) -> Rows:
        """Some of the rows, in the same memory."""
        return Rows(*(column[which] for column in self.columns()))

    def take(self, index: Tensor) -> Rows:
        """A copy of rows `index` [n] int64."""
        return Rows(*(column[index] for column in self.columns()))

    def put(self, index: Tensor, other: Rows) -> None:
        """Rows `index` become `other`'s."""
        for mine, theirs in zip(self.columns(), other.columns(), strict=True):
            mine.index_copy_(0, index, theirs)

    def copy_(self, other: Rows) -> None:
        """They become `other`'s, of the same number, in place."""
        for mine, theirs in zip(self.columns(), other.columns(), strict=True):
            mine.copy_(theirs)

    def advance(self, hidden: Tensor, num_tokens: Tensor | int) -> None:
        """`num_tokens` ([R], or one number) more lie behind them, in place; `hidden` [R, D] predicts the next."""
        self.hidden.copy_(hidden)
        self.position.add_(num_tokens)
        self.own_length.add_(num_tokens)

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        return Rows(*(torch.cat(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))


class Store:
    """Columns of keys and values [layers, K, columns, E], allocated once and divided into spans.

    Args:
        shape: of the decoder.
        lengths: columns of each span; they lie one after another. One spare column lies behind them, which padding
            rows may overwrite.
    """

    def __init__(self, shape: CacheShape, lengths: Sequence[int]) -> None:
        self.capacity = sum(lengths) + 1
        self.spare = self.capacity - 1
        size = (shape.num_layers, shape.num_heads, self.capacity, shape.head_dim)
        # Uninitialised: a column is read only after it was written.
        self.keys = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.values = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.nowhere = torch.tensor([0, 0, self.spare, 0], device=shape.device)
        """[4] spans of a row that stands still: no prompt, and the spare column of its own."""
        self.divide(lengths)

    def fits(self, lengths: Sequence[int]) -> bool:
        """The spans fit into what is allocated."""
        return sum(lengths) < self.capacity

    def divide(self, lengths: Sequence[int]) -> None:
        """New spans in the same memory; what the old ones held is forgotten."""
        assert self.fits(lengths)
        self.starts = [0, *accumulate(lengths)]

    def copy_span(self, start: int, other: Store, other_start: int, length: int) -> None:
        """Columns of `other` -> columns from `start` on, all layers."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, :, start : start + length] = theirs[:, :, other_start : other_start + length]


class Prefill:
    """Attention layout of the prompts' one forward pass: causal within each, and all of it is kept.

    Args:
        store: one span per prompt.
        whole: of each prompt, how many of its first tokens see each other whole; None: none of any.
    """

    def __init__(self, store: Store, whole: Sequence[int] | None = None) -> None:
        num_prompts = len(store.starts) - 1
        nobody = torch.zeros(num_prompts + 1, dtype=torch.int32)
        offsets = torch.tensor(store.starts, dtype=torch.int32)
        leads = torch.tensor(whole, dtype=torch.int32) if whole is not None and any(whole) else None
        self._store = store
        self._layout = SharedPrefixLayout(offsets, nobody[:1], nobody, leads).to(store.keys.device)
        self.position_ids = self._layout.position_ids()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        used = self._store.starts[-1]
        self._store.keys[layer, :, :used] = key[0]
        self._store.values[layer, :, :used] = value[0]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_prefix_attention(q, k, v, self._layout, scale=scale)[None]


class FillIn:
    """Attention layout of one step of masked drawing: spans that see themselves and their prefixes whole.

    Nothing is kept: the next step computes the spans again, with more of their places filled in.

    Args:
        store: keys and values of the prefixes, a span each.
        layout: its prefixes are the store's spans, its responses the images.
    """

    def __init__(self, store: Store, layout: SharedPrefixLayout) -> None:
        self._store, self._layout = store, layout

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        keys, values = self._store.keys[layer], self._store.values[layer]
        return cached_prefix_attention(q, k, v, keys, values, self._layout, scale=scale)[None]


class Decode:
    """Attention layout of one decoding step: one token per row, written behind the row's own columns.

    Args:
        prompts: read.
        own: written.
        spans: [R, 4] int64, lengths before this step.
    """

    def __init__(self, prompts: Store, own: Store, spans: Tensor) -> None:
        self.prompts, self.own, self.spans = prompts, own, spans

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        prompts, own = self.prompts, self.own
        attended = prefix_decode_attention(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            prompts.keys[layer],
            prompts.values[layer],
            own.keys[layer],
            own.values[layer],
            self.spans,
            scale=scale,
        )
        return attended[:, None]


class Extend:
    """Attention layout of several given tokens per row at once, behind what the row has (drawing and follow-up turns).

    One attention call over all rows: each new token is a row of `prefix_decode_attention` that sees its row's tokens
    before it, whose keys are written first.

    Args:
        prompts: read.
        own: written.
        spans: [R, 4] int64, lengths before this pass.
        lengths: new tokens of each row; the rest of [R, N] is padding at the end, whose output means nothing.
    """

    def __init__(self, prompts: Store, own: Store, spans: Tensor, lengths: Sequence[int]) -> None:
        self._prompts, self._own = prompts, own
        count = torch.tensor(lengths, device=spans.device)
        self._row = torch.arange(len(lengths), device=spans.device).repeat_interleave(count)
        self._place = torch.cat([torch.arange(length, device=spans.device) for length in lengths])
        self._spans = spans[self._row].clone()
        self._spans[:, 3] += self._place
        self._columns = self._spans[:, 2] + self._spans[:, 3]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        prompts, own = self._prompts, self._own
        q, k, v = (x.transpose(1, 2)[self._row, self._place] for x in (query, key, value))
        for store, x in ((own.keys, k), (own.values, v)):
            store[layer].index_copy_(1, self._columns, x.transpose(0, 1))
        attended = torch.zeros_like(query.transpose(1, 2))
        attended[self._row, self._place] = prefix_decode_attention(
            q,
            k,
            v,
            prompts.keys[layer],
            prompts.values[layer],
            own.keys[layer],
            own.values[layer],
            self._spans,
            scale=scale,
        )
        return attended
