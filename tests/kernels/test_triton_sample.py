"""Triton's own random numbers are those of the reference; its sampler follows the contract of test_sample.py.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE

from syncr1.kernels.reference.philox import uniform

pytest.importorskip("triton")


def check_uniform_is_the_references() -> None:
    """Bit for bit, for seeds and offsets that use all 64 bits."""
    import triton
    import triton.language as tl

    from syncr1.kernels.triton_ops.philox import row_uniform

    @triton.jit
    def kernel(seed, offset, out):  # type: ignore[no-untyped-def]
        index = tl.program_id(0)
        tl.store(out + index, row_uniform(tl.load(seed + index), tl.load(offset + index)))

    kernel.fn.__globals__.update(tl=tl, row_uniform=row_uniform)
    seed = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345], device=DEVICE)
    offset = torch.tensor([0, 2**32, 2**62 + 5, -1, 2**31, 7], device=DEVICE)
    out = torch.empty(6, dtype=torch.float64, device=DEVICE)
    kernel[(6,)](seed, offset, out)
    assert torch.equal(out, uniform(seed, offset))
