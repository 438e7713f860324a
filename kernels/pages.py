"""Large pages for large CPU buffers.

A fresh buffer of 32 MB is 8192 page faults, which took as long as sweeping over it several times; with pages of 2 MB it
is 16. Linux gives them where asked for (`madvise`), which torch does only under THP_MEM_ALLOC_ENABLE.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = 4096
LARGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    """libc's madvise, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return call


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on large pages where that is possible and worth it."""
    made = torch.empty(shape, dtype=dtype, device=device)
    size = made.numel() * made.element_size()
    if type(made) is Tensor and device.type == "cpu" and size >= 2 * LARGE_PAGE and (call := _madvise()) is not None:
        first = -(-made.data_ptr() // PAGE) * PAGE
        call(first, made.data_ptr() + size - first, MADV_HUGEPAGE)  # a wish: failing changes nothing but the time
    return made
