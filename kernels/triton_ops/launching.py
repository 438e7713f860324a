"""What every launch needs: the device, and numbers in the forms that kernels take."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def interpreting() -> bool:
    """TRITON_INTERPRET=1: kernels run as Python on CPU tensors, at milliseconds per program."""
    return bool(triton.knobs.runtime.interpret)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def halves(value: float) -> tuple[float, float]:
    """A float64 as two float32 that add up to it: kernels take Python floats as float32 only."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, the same memory."""
    return None if mask is None else mask.view(torch.uint8)
