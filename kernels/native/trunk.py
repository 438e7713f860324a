"""Row-wise ops of a decoding trunk in C++, without gradients. Dims: `R` rows, `D` and `F` widths, `H` and `K` heads,
`E` head width.

Float32 or bfloat16, one type per call, unit stride on the last axis; rows (and heads) may lie apart. Inside it is
float32, rounded where transformers' modules round. A row's result depends bitwise on that row alone, whatever stands
beside it and however many threads work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import DOUBLE, INT, POINTER, function

NORM = (*(POINTER,) * 3, *(INT,) * 5, DOUBLE)
PRODUCT = (*(POINTER,) * 3, *(INT,) * 6)
ROTATION = (*(POINTER,) * 6, *(INT,) * 12)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[R, D] `weight * (x * rsqrt(mean(x²) + eps))` of x [R, D] and weight [D] (contiguous), as LlamaRMSNorm."""
    assert x.dtype == weight.dtype and x.stride(1) == 1
    num_rows, width = x.shape
    output = torch.empty(num_rows, width, dtype=x.dtype)
    function("syncr1_rms_norm", *NORM)(
        x.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        x.dtype == torch.bfloat16,
        num_rows,
        width,
        x.stride(0),
        torch.get_num_threads(),
        eps,
    )
    return output


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """[R, F] `silu(gate) * up` of two [R, F], as LlamaMLP."""
    assert gate.dtype == up.dtype and gate.stride(1) == up.stride(1) == 1
    num_rows, width = gate.shape
    output = torch.empty(num_rows, width, dtype=gate.dtype)
    function("syncr1_silu_mul", *PRODUCT)(
        gate.data_ptr(),
        up.data_ptr(),
        output.data_ptr(),
        gate.dtype == torch.bfloat16,
        num_rows,
        width,
        gate.stride(0),
        up.stride(0),
        torch.get_num_threads(),
    )
    return output


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(`q*cos + rotate_half(q)*sin` [R, H, E], the same of k [R, K, E]) with cos and sin [R, E], contiguous.

    Bitwise what transformers' apply_rotary_pos_emb gives for one token per row.
    """
    assert q.dtype == k.dtype == cos.dtype == sin.dtype
    assert q.stride(2) == k.stride(2) == cos.stride(1) == sin.stride(1) == 1
    num_rows, num_heads, width = q.shape
    num_kv_heads = k.shape[1]
    q_output = torch.empty(num_rows, num_heads, width, dtype=q.dtype)
    k_output = torch.empty(num_rows, num_kv_heads, width, dtype=q.dtype)
    function("syncr1_rope", *ROTATION)(
        q.data_ptr(),
        k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        q_output.data_ptr(),
        k_output.data_ptr(),
        q.dtype == torch.bfloat16,
        num_rows,
        num_heads,
        num_kv_heads,
        width,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        cos.stride(0),
        sin.stride(0),
        torch.get_num_threads(),
    )
    return q_output, k_output
