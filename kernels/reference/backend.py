"""Backend `reference`: every op in plain PyTorch, any float dtype, any device. It is the specification.

Losses and log-probabilities are ordinary differentiable code: their gradients are autograd's, and what the other
backends derive by hand is held against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .advantage import standardize as group_advantages
from .decode_attention import prefix_decode_attention
from .logp import linear_logp, selective_logp
from .loss import grpo_loss, linear_grpo_loss
from .sample import sample
from .select import dgs_select

__all__ = [
    "unavailable_reason",
    "unsupported_reason",
    "group_advantages",
    "dgs_select",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logp",
    "selective_logp",
    "sample",
    "prefix_decode_attention",
]


def unavailable_reason() -> str | None:
    """None: it is always there."""
    return None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None: it serves every device and float dtype."""
    return None
