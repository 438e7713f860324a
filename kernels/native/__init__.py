"""Backend `native`: C++ on CPU (`kernels/csrc/`), float32 and bfloat16. Contract: `syncr1.kernels.terms.Backend`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .decode_attention import prefix_decode_attention
from .groups import dgs_select, group_advantages
from .library import load
from .loss import token_loss
from .rows import gradient_rows, loss_rows, score_rows
from .sample import sample

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

FINDS_NONFINITE = True
DTYPES = (torch.float32, torch.bfloat16)


def unavailable_reason() -> str | None:
    """Why the backend is absent, or None."""
    library = load()
    return None if isinstance(library, ctypes.CDLL) else library


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why these tensors are not served, or None."""
    if any(t.device.type != "cpu" for t in tensors):
        return "it serves CPU tensors only"
    if any(t.dtype not in DTYPES for t in tensors):
        return f"it serves {' and '.join(str(d) for d in DTYPES)} only"
    return None
