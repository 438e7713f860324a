"""The C++ library: `libsyncr1_native.so`, built at install where a compiler was found, loaded through a plain C ABI.

Every C signature stands where its function is defined in `csrc/`. None is the null pointer. Rows, sampler, decode step
and trunk use the widest instruction set of the machine; `SYNCR1_ISA=generic|avx2|avx512` asks for one of them.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

ABI_VERSION = 8
LIBRARY = Path(__file__).parent.parent / "libsyncr1_native.so"
ISA_VARIABLE = "SYNCR1_ISA"

POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


@cache
def load(path: Path | None = None) -> ctypes.CDLL | str:
    """The library (at `path`, else LIBRARY), or the reason why it cannot be used."""
    path = LIBRARY if path is None else path
    if not path.exists():
        return "the C++ library was not built (no compiler or cmake at install time); install again where there is one"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ library does not load ({error}); install again on this machine"
    library.syncr1_abi_version.restype = ctypes.c_int32
    found = library.syncr1_abi_version()
    if found != ABI_VERSION:
        return f"the C++ library has ABI {found}, this code wants {ABI_VERSION}; install again"
    if instruction_set(library) is None:
        return f"{ISA_VARIABLE}={os.environ.get(ISA_VARIABLE)} is not available here; leave it unset"
    return library


def instruction_set(library: ctypes.CDLL) -> str | None:
    """Name of the instruction set in use, None where the one that was asked for is not there."""
    library.syncr1_instruction_set.restype = ctypes.c_char_p
    name: bytes | None = library.syncr1_instruction_set()
    return None if name is None else name.decode()


@cache
def function(name: str, *arguments: type) -> Any:
    """One C function with its argument types; it returns nothing."""
    library = load()
    assert isinstance(library, ctypes.CDLL)  # dispatch asked unavailable_reason()
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, None
    return found


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element."""
    return None if tensor is None else tensor.data_ptr()
