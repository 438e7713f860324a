"""The C++ library under every instruction set of this machine, and memory that shows who writes beside it."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from syncr1.kernels.native import library

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
MARGIN = 64


@cache
def _load_copy(name: str) -> ctypes.CDLL | str:
    """A copy chooses again: the loader takes the same file for the same library."""
    folder = tempfile.mkdtemp()
    copy = Path(shutil.copy(library.LIBRARY, folder))
    with mock.patch.dict(os.environ, {library.ISA_VARIABLE: name}):
        loaded = library.load(copy)
    shutil.rmtree(folder)
    return loaded


@contextmanager
def using(name: str) -> Iterator[None]:
    """Every native call goes to that instruction set; the test is skipped where the machine lacks it."""
    loaded = _load_copy(name)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    assert library.instruction_set(loaded) == name
    library.function.cache_clear()
    with mock.patch.object(library, "load", lambda: loaded):
        yield
    library.function.cache_clear()


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """What torch.empty returns lies between margins, which must stay as they are."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * MARGIN,), torch.nan if dtype.is_floating_point else -77, dtype=dtype)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(shape)

    assert empty is not guarded
    with mock.patch.object(torch, "empty", guarded):
        yield
    assert buffers
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        assert bool(((margins == -77) | torch.isnan(margins.double())).all())


class Guarded:
    """A copy of a matrix whose rows lie `gap` apart, `before` of it on the left, in memory full of NaN."""

    def __init__(self, values: Tensor, gap: int = 7, before: int | None = None) -> None:
        num_rows, width = values.shape
        start = gap // 2 if before is None else before
        self.buffer = torch.full((num_rows + 2, width + gap), torch.nan, dtype=values.dtype, device=values.device)
        self.matrix = self.buffer[1 : num_rows + 1, start : start + width]
        self.matrix.copy_(values)

    def assert_untouched_around(self) -> None:
        """Nothing but the matrix itself was written."""
        buffer = self.buffer.clone()
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        offset = self.matrix.storage_offset() - buffer.stride(0)
        inside[1:-1, offset : offset + self.matrix.shape[1]] = True
        assert bool(torch.isnan(buffer[~inside]).all())
