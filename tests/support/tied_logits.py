"""Rows of logits whose sets for top_p are known exactly, and a draw that shows where a set ends.

With U next to 1 the last id of the kept set is drawn; ids come in falling order of weight, so its place is the size of
the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from math import ceil

import torch
from torch import Tensor

from syncr1.kernels.reference.philox import uniform

SEED = 11


@cache
def late_offset() -> int:
    """An offset whose uniform number is within 1e-5 of 1."""
    numbers = uniform(SEED, torch.arange(1 << 18))
    assert float(numbers.max()) > 1 - 1e-5
    return int(numbers.argmax())


def levels(counts: list[int], weights: list[int]) -> Tensor:
    """[1, V] logits: `counts[i]` ids of weight `weights[i]`, which fall."""
    each = [torch.full((n,), float(w), dtype=torch.float64) for n, w in zip(counts, weights, strict=True)]
    return torch.cat(each).log().float()[None]


def exact_size(counts: list[int], weights: list[int], share: Fraction, top_k: int = 0) -> int:
    """Ids in the smallest set that holds `share` of what top_k leaves."""
    kept = [w for n, w in zip(counts, weights, strict=True) for _ in range(n)][: top_k or None]
    wanted, held = share * sum(kept), Fraction(0)
    for size, weight in enumerate(kept, 1):
        held += weight
        if held >= wanted:
            return size
    return len(kept)


def tied_cases(seed: int, number: int, largest: int) -> Iterator[tuple[list[int], list[int], Fraction, int]]:
    """(counts, weights, share, top_k): shares that some set holds exactly, up to next to 1, and shares between."""
    random = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    for _ in range(number):
        size = pick(1, largest)
        kinds = [[1], [3, 1], [7, 2], [12, 5, 1], [30, 1]][pick(0, 4)]
        counts = [max(1, size // len(kinds) - pick(0, 2)) for _ in kinds]
        total = sum(counts)
        top_k = [0, 0, pick(1, total)][pick(0, 2)]
        kept = [w for n, w in zip(counts, kinds, strict=True) for _ in range(n)][: top_k or None]
        held = pick(1, len(kept))
        if pick(0, 3) == 0:  # all but one
            held = max(1, len(kept) - 1)
        mass = Fraction(sum(kept[:held]))
        if pick(0, 2) == 0:  # half an id more
            mass += Fraction(kept[min(held, len(kept) - 1)], 2)
        yield counts, kinds, min(mass / sum(kept), Fraction(1)), top_k


def uniform_shares(vocabulary: int) -> Iterator[tuple[float, int]]:
    """(top_p, ids that hold it) for equal logits: every k / V, as Python rounds it."""
    for kept in range(1, vocabulary):
        yield kept / vocabulary, kept
    yield 0.5, ceil(vocabulary / 2)
