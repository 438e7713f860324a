"""Sums and extremes over segments of an axis, in a fixed order (no atomics)."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_segments(values: Tensor, offsets: Tensor, reduce: str, empty: float = 0.0) -> Tensor:
    """[n] values → [len(offsets) - 1]; empty segments give `empty`."""
    if values.numel() == 0:
        # segment_reduce refuses empty data; the sum keeps the result in the graph.
        return values.new_full((offsets.numel() - 1,), empty) + values.sum()
    return torch.segment_reduce(values, reduce, offsets=offsets.long(), initial=empty)


def sum_segments(values: Tensor, offsets: Tensor) -> Tensor:
    """[n] float → [len(offsets) - 1]; empty segments give 0."""
    return reduce_segments(values, offsets, "sum")
