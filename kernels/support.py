"""Which ids of a vocabulary a row keeps, as bits: bit j of word w is id 32 w + j.

What `cfg_sample` truncates to and the losses renormalise over: V/8 bytes a row beside the 4 V of its logits. Bits from
V on mean nothing.

Dims: `N` rows, `V` vocabulary, `W` = ceil(V/32) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def num_words(vocabulary: int) -> int:
    """W."""
    return -(-vocabulary // WORD)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(WORD, dtype=torch.int32, device=like.device)


def pack(kept_NV: Tensor) -> Tensor:
    """[N, V] bool -> [N, W] int32."""
    num_rows, vocabulary = kept_NV.shape
    words = num_words(vocabulary)
    padded = torch.nn.functional.pad(kept_NV, (0, words * WORD - vocabulary)).view(num_rows, words, WORD)
    return (padded.int() << _bits(kept_NV)).sum(dim=-1, dtype=torch.int32)


def unpack(support_NW: Tensor, vocabulary: int) -> Tensor:
    """[N, W] int32 -> [N, V] bool."""
    return ((support_NW.unsqueeze(-1) >> _bits(support_NW)) & 1).bool().flatten(1)[:, :vocabulary]


def holds(support_NW: Tensor, ids_N: Tensor) -> Tensor:
    """[N] bool: whether each row keeps its id."""
    words_N = support_NW.gather(1, (ids_N // WORD).unsqueeze(1)).squeeze(1)
    return ((words_N >> (ids_N % WORD).int()) & 1).bool()
