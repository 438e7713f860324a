"""Decode steps for the tests of prefix_decode_attention: caches full of NaN outside of the spans, and their truth.

Dims: `R` rows, `Hq` query heads, `Hkv` key-value heads, `E` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 3
"""Columns of NaN between spans."""


@dataclass(frozen=True)
class Step:
    """The tensors of one call, in the order of its arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_keys: Tensor
    prefix_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    spans: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def map(self, change: Callable[[Tensor], Tensor]) -> Step:
        return Step(*map(change, self.tensors()))

    def to(self, dtype: torch.dtype) -> Step:
        """A copy, laid out in memory as this one; the spans keep their dtype."""
        return self.map(lambda t: _copy(t, dtype if t.is_floating_point() else t.dtype))

    def rows(self, which: Sequence[int] | Tensor) -> Step:
        """A copy of the caches and of some rows only."""
        index = torch.as_tensor(which, dtype=torch.int64)
        copy = self.to(self.query.dtype)
        return replace(
            copy, query=self.query[index], key=self.key[index], value=self.value[index], spans=self.spans[index]
        )


def make_step(
    prefixes: Sequence[tuple[int, int]],
    own_lengths: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> Step:
    """(rows, prefix length) of each group; own length before the new token of each row."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, (num_heads, num_kv_heads) = sum(rows for rows, _ in prefixes), heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    def cache(filled: Sequence[tuple[int, int]]) -> Tensor:
        """Heads and columns lie apart, and only the spans hold numbers."""
        end = max((start + length for start, length in filled), default=0) + GAP
        columns = torch.full((num_kv_heads, end + 1, width + 2), torch.nan)[:, :end, 1 : 1 + width]
        for start, length in filled:
            columns[:, start : start + length] = normal(num_kv_heads, length, width)
        return columns

    starts, at = [], GAP
    for _, length in prefixes:
        starts.append((at, length))
        at += length + GAP
    own, at = [], GAP
    for length in own_lengths:
        own.append((at, length))
        at += length + 1 + GAP
    shared = [span for span, (rows, _) in zip(starts, prefixes, strict=True) for _ in range(rows)]
    spans = torch.tensor([[*a, *b] for a, b in zip(shared, own, strict=True)]).reshape(num_rows, 4)
    step = Step(
        normal(num_heads, num_rows, width).transpose(0, 1),
        normal(num_rows, 2 * num_kv_heads, width)[:, ::2],
        normal(num_rows, num_kv_heads + 1, width)[:, 1:],
        cache(starts),
        cache(starts),
        cache(own)[:, : at + 1],
        cache(own)[:, : at + 1],
        spans,
    )
    return step.map(lambda t: _copy(t, dtype) if t.is_floating_point() else t)


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """With the same strides, and with what lies between them."""
    size = values.untyped_storage().nbytes() // values.element_size()
    whole = values.as_strided((size,), (1,), 0).to(dtype)
    return whole.as_strided(values.shape, values.stride(), values.storage_offset())


def attention(step: Step, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """[R, Hq, E] by torch's own attention, one row at a time."""
    outputs = []
    repeats = step.query.shape[1] // step.own_keys.shape[0]
    for query, key, value, span in zip(step.query, step.key, step.value, step.spans.tolist(), strict=True):
        start, length, own_start, own_length = span
        own = slice(own_start, own_start + own_length)
        keys = torch.cat([step.prefix_keys[:, start : start + length], step.own_keys[:, own], key[:, None]], 1)
        values = torch.cat([step.prefix_values[:, start : start + length], step.own_values[:, own], value[:, None]], 1)
        keys, values = (t.to(dtype).repeat_interleave(repeats, 0) for t in (keys, values))
        outputs.append(F.scaled_dot_product_attention(query.to(dtype)[:, None], keys, values, scale=scale)[:, 0])
    return torch.stack(outputs)


def _most(values: Tensor) -> float:
    """The largest, NaN outside of the spans left out."""
    return float(values.nan_to_num().abs().max()) if values.numel() else 0.0


def assert_close_to_truth(step: Step, output: Tensor, scale: float | None = None) -> None:
    """The error is at most twice that of torch in the same dtype, and what rounding the largest possible score does to
    a weight, which torch may or may not meet; in 16 bits, that of rounding the exact result."""
    truth = attention(step, scale)
    error = (output.double() - truth).abs()
    if output.dtype in (torch.float32, torch.float64):
        plain = (attention(step, scale, output.dtype).double() - truth).abs().max()
        eps, factor = torch.finfo(output.dtype).eps, step.query.shape[-1] ** -0.5 if scale is None else scale
        keys = (step.prefix_keys, step.own_keys, step.key)
        score = factor * float(step.query.norm(dim=-1).max()) * max(_most(t.norm(dim=-1)) for t in keys)
        value = max(_most(t) for t in (step.prefix_values, step.own_values, step.value))
        floor = 4 * eps * truth.abs().max() + eps / 4 * score * value
        assert error.max() <= 2 * plain + floor, (float(error.max()), float(plain))
    else:
        rounding = torch.finfo(output.dtype).eps / 2 * truth.abs()
        assert bool((error <= 1.01 * rounding + 4e-6 * truth.abs().max()).all()), float((error - rounding).max())


def assert_written(before: Step, after: Step) -> None:
    """Each row's new column holds its key and value; nothing else in the four caches changed."""
    own_keys, own_values = before.own_keys.clone(), before.own_values.clone()
    for key, value, (_, _, start, length) in zip(before.key, before.value, before.spans.tolist(), strict=True):
        own_keys[:, start + length], own_values[:, start + length] = key, value
    wanted = replace(before, own_keys=own_keys, own_values=own_values)
    for a, b in zip(after.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
