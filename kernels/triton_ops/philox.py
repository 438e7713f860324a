"""The uniform of a row, bit for bit that of `syncr1.kernels.reference.philox`.

Triton's own Philox4x32-10 has Random123's constants and word order; only the way from words to a number is added here.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_uniform(seed, offset):
    """One float64 in (0, 1) on a grid of 2^-48 from int64 scalars: key `seed`, counter (`offset`, 0)."""
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low & 0
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    grid = (first.to(tl.int64) << 16) | (second >> 16).to(tl.int64)
    return (grid.to(tl.float64) + 0.5) * 3.552713678800501e-15
