"""Registered op `syncr1::cfg_sample`: no gradient, every backend. Dims: `B` rows, `V` vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_drawn, check_forbidden
from ..dispatch import module_of
from .register import fakes, implements


@implements(
    "cfg_sample",
    (
        "(Tensor cond, Tensor? uncond, float cfg_weight, float temperature, int top_k, float top_p, Tensor seed,"
        " Tensor offset, Tensor? forbidden, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None,
    cfg_weight: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: Tensor,
    offset: Tensor,
    forbidden: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token [B] int64, logp [B], logp_mixed [B], entropy [B])."""
    check_forbidden("cfg_sample", forbidden, cond.shape[1])
    drawn = module_of(backend).sample(
        cond,
        uncond,
        cfg_weight=cfg_weight,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed.contiguous(),
        offset=offset.contiguous(),
        forbidden=forbidden,
    )
    check_drawn("cfg_sample", drawn.logp_mixed)
    return drawn.token, drawn.logp, drawn.logp_mixed, drawn.entropy


@fakes("cfg_sample")
def _(
    cond: Tensor,
    uncond: Tensor | None,
    cfg_weight: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: Tensor,
    offset: Tensor,
    forbidden: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if cond.dtype == torch.float64 else torch.float32
    logp, mixed, entropy = (cond.new_empty(cond.shape[:1], dtype=dtype) for _ in range(3))
    return cond.new_empty(cond.shape[:1], dtype=torch.int64), logp, mixed, entropy
