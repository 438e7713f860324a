"""As many of glibc's heaps as a run needs, so that its memory does not grow by threads that come and go.

glibc gives a new thread any of eight heaps per core that is free, and every heap keeps the most that was ever used of
it.  A run starts threads in every step, for its rewards: the one that needs ten megabytes lands in another heap now and
then, and over hundreds of steps each of them has held its ten megabytes (measured on two cores: 65 KiB a step; on a
machine with 64 cores there are 512 heaps).
"""

from __future__ import annotations

import ctypes
import os

HEAPS = 2
"""The main thread's and one for all others, whose work is in kernels, not in allocating."""
_M_ARENA_MAX = -8  # of malloc.h


def bound_heaps() -> bool:
    """Bounds the number of heaps from now on; False where the user has set it, or another C library has none."""
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, HEAPS))
