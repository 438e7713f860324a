"""Backend `triton`: kernels for CUDA GPUs, and on CPU tensors under TRITON_INTERPRET=1, for tests.

The contract is `syncr1.kernels.terms.Backend`. The package can be imported without triton; then `unavailable_reason`
says so and nothing else exists.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "FINDS_NONFINITE",
    "unavailable_reason",
    "unsupported_reason",
    "group_advantages",
    "dgs_select",
    "token_loss",
    "score_rows",
    "loss_rows",
    "gradient_rows",
    "sample",
    "prefix_decode_attention",
]

FINDS_NONFINITE = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None

if INSTALLED:
    from .decode_attention import prefix_decode_attention
    from .groups import dgs_select, group_advantages
    from .launching import interpreting
    from .loss import token_loss
    from .rows import gradient_rows, loss_rows, score_rows
    from .sample import sample


def unavailable_reason() -> str | None:
    """Why the backend is absent, or None."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no CUDA device; TRITON_INTERPRET=1, set before triton is imported, runs it slowly on the CPU"
    return None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why these tensors are not served, or None."""
    if any(t.device.type != "cuda" and not (t.device.type == "cpu" and interpreting()) for t in tensors):
        return "it serves CUDA tensors, and CPU tensors under TRITON_INTERPRET=1"
    if any(t.dtype not in DTYPES for t in tensors):
        return f"it serves {', '.join(str(dtype) for dtype in DTYPES)} only"
    return None
