"""The packed layout: all sequences lie one after another on one token axis, no padding.

Sequence s is tokens `cu_seqlens[s]:cu_seqlens[s+1]`; group p is sequences `group_offsets[p]:group_offsets[p+1]`. Both
may be empty: a pruned trajectory keeps its place on the sequence axis with zero tokens, so that group statistics are
always taken over all members.

Dims: `T` tokens, `S` sequences, `P` prompts (groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """Which segment each of `total` positions belongs to: [total] int64."""
    lengths = offsets.long().diff()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths, output_size=total)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Which token belongs to which sequence, and which sequence to which group."""

    cu_seqlens: Tensor
    """[S+1] int32."""
    group_offsets: Tensor
    """[P+1] int32."""
    modality: Tensor | None = None
    """[T] uint8, of the *target* token: 0 text, 1 image; None = all text."""
    loss_mask: Tensor | None = None
    """[T] bool, tokens the policy produced; None = all."""
    total: int | None = None
    """T, where a tensor of that length tells it; None reads it from cu_seqlens, which makes a GPU wait."""

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1]) if self.total is None else self.total

    @property
    def sequence_of_token(self) -> Tensor:
        """[T] int64."""
        return segment_ids(self.cu_seqlens, self.num_tokens)

    @property
    def image_tokens(self) -> Tensor:
        """[T] bool."""
        if self.modality is not None:
            return self.modality.bool()
        return torch.zeros(self.num_tokens, dtype=torch.bool, device=self.cu_seqlens.device)
