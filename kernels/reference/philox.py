"""Philox4x32-10: random numbers that depend on (seed, offset) alone, so a row's draw does not depend on its batch.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Random123's constants. 32-bit words live
in int64 tensors: a product of two of them wraps around, but its bit pattern is the unsigned one.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


def philox(counter_4B: Tensor, key_2B: Tensor) -> Tensor:
    """Four counter words and two key words per row → four random words per row: [4, B] int64 in [0, 2³²)."""
    even, odd = counter_4B[0::2], counter_4B[1::2]  # words (0, 2) are multiplied, (1, 3) are mixed in
    multipliers = torch.tensor(MULTIPLIERS, device=counter_4B.device).unsqueeze(1)
    weyl = torch.tensor(WEYL, device=counter_4B.device).unsqueeze(1)
    key = key_2B
    for _ in range(NUM_ROUNDS):
        product = even * multipliers
        high, low = (product >> 32) & WORD, product & WORD
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + weyl) & WORD
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seed: int | Tensor, offset: Tensor, stream: int = 0) -> Tensor:
    """One float64 in (0, 1) per offset, on a grid of 2⁻⁴⁸.

    The key is `seed`, the counter is (`offset`, `stream`); `stream` separates uses of one seed.
    """
    offset_B = offset.long()
    seed_B = torch.as_tensor(seed, dtype=torch.int64, device=offset_B.device).expand_as(offset_B)
    zeros_B = torch.zeros_like(offset_B)
    counter = torch.stack([offset_B & WORD, (offset_B >> 32) & WORD, zeros_B + stream, zeros_B])
    words = philox(counter, torch.stack([seed_B & WORD, (seed_B >> 32) & WORD]))
    return (((words[0] << 16) | (words[1] >> 16)).double() + 0.5) * 2.0**-48
