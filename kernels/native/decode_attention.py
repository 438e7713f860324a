"""One decode step over shared prefixes in C++. Dims: `R` rows, `Hq` and `Hkv` heads, `E` head width."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from ..terms import DecodeStep
from .library import POINTER, function, pointer

TENSORS = ("query", "key", "value", "prefix_key", "prefix_value", "own_key", "own_value")
"""Those that have strides of their own; the first fields of `DecodeStep`."""


class Decoding(ctypes.Structure):
    """`syncr1_decoding` of csrc/decode_attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "prefix_keys", "prefix_values")),
        *((name, c_void_p) for name in ("own_keys", "own_values", "spans", "output")),
        *((name, c_int64) for name in ("bfloat16", "num_rows", "num_heads", "num_kv_heads", "width", "num_threads")),
        *((f"{name}_{axis}", c_int64) for name in TENSORS for axis in ("stride0", "stride1")),
        ("scale", c_double),
    )


def prefix_decode_attention(step: DecodeStep) -> Tensor:
    """[R, Hq, E]; neighbouring rows with one prefix read it once. See `terms.Backend`."""
    call = function("syncr1_prefix_decode_attention", POINTER)
    num_rows, num_heads, width = step.query.shape
    output = torch.empty(num_rows, num_heads, width, dtype=step.query.dtype)
    tensors = step[:7]  # TENSORS
    decoding = Decoding(
        *map(pointer, tensors),
        pointer(step.spans),
        pointer(output),
        step.query.dtype == torch.bfloat16,
        num_rows,
        num_heads,
        step.own_keys.shape[0],
        width,
        torch.get_num_threads(),
        *(stride for tensor in tensors for stride in tensor.stride()[:2]),
        step.scale,
    )
    call(byref(decoding))
    return output
