"""One decode step over shared prefixes in C++. Dims: `R` rows, `Hq` and `Hkv` heads, `E` head width."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from .library import POINTER, function, pointer

TENSORS = ("query", "key", "value", "prefix_key", "prefix_value", "own_key", "own_value")


class Decoding(ctypes.Structure):
    """`syncr1_decoding` of csrc/decode_attention.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "prefix_keys", "prefix_values")),
        *((name, c_void_p) for name in ("own_keys", "own_values", "spans", "output")),
        *((name, c_int64) for name in ("bfloat16", "num_rows", "num_heads", "num_kv_heads", "width", "num_threads")),
        *((f"{name}_{axis}", c_int64) for name in TENSORS for axis in ("stride0", "stride1")),
        ("scale", c_double),
    )


def prefix_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    spans: Tensor,
    scale: float,
) -> Tensor:
    """[R, Hq, E]; neighbouring rows with one prefix read it once. See `terms.Backend`."""
    call = function("syncr1_prefix_decode_attention", POINTER)
    num_rows, num_heads, width = query.shape
    output = torch.empty(num_rows, num_heads, width, dtype=query.dtype)
    tensors = (query, key, value, prefix_keys, prefix_values, own_keys, own_values)
    decoding = Decoding(
        *map(pointer, tensors), pointer(spans), pointer(output), query.dtype == torch.bfloat16, num_rows, num_heads,
        own_keys.shape[0], width, torch.get_num_threads(),
        *(stride for tensor in tensors for stride in tensor.stride()[:2]), scale,
    )  # fmt: skip
    call(byref(decoding))
    return output
