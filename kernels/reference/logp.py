"""Log-probability and entropy of tokens, from logits or straight from hidden states.

    logp_n = z_n[y_n] − logsumexp(z_n),   H_n = logsumexp(z_n) − Σ_v p_nv z_nv,   z = (hidden · Wᵀ + b) / temperature

`linear_logp` holds the logits of one chunk of rows at a time and forms them again in backward: C·V values instead of
the N·V of logits, of their softmax and of their gradient. Source: Cut Your Losses (arXiv 2411.09009); Liger.

Dims: `N` rows, `V` vocabulary, `D` hidden, `C` rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import unpack

CHUNK_ROWS = 4096
"""Rows per chunk: large enough that the read-modify-write of dW stays a few percent of the GEMMs."""
LOGP_FLOOR = -1e4
"""exp of it is 0 in every dtype: turns 0 · (−inf) of the entropy into 0."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def selective_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `syncr1.kernels.api.selective_logp`."""
    logits_NV = logits.to(accumulator(logits.dtype)) / temperature
    if forbidden is not None:
        logits_NV = logits_NV.index_fill(1, forbidden, -torch.inf)
    if support is not None:
        logits_NV = logits_NV.masked_fill(~unpack(support, logits.shape[1]), -torch.inf)
    logp_NV = logits_NV.log_softmax(dim=-1)
    entropy_N = -(logp_NV.exp() * logp_NV.clamp_min(LOGP_FLOOR)).sum(dim=-1)
    return logp_NV.gather(1, targets.long().unsqueeze(1)).squeeze(1), entropy_N


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    support: Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """See `syncr1.kernels.api.linear_logp`."""
    arguments = (hidden, weight, bias, targets.long(), temperature, forbidden, support, chunk_rows)
    logp, entropy = _LinearLogp.apply(*arguments)
    return logp, entropy


def _chunk_logits(
    hidden_CD: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    support_CW: Tensor | None,
) -> Tensor:
    """One chunk's logits in the accumulator's dtype; the GEMM runs in the operands' dtype."""
    logits_CV = F.linear(hidden_CD, weight, bias).to(accumulator(hidden_CD.dtype))
    if temperature != 1.0:
        logits_CV = logits_CV / temperature
    if forbidden is not None:
        logits_CV.index_fill_(1, forbidden, -torch.inf)
    if support_CW is not None:
        logits_CV.masked_fill_(~unpack(support_CW, logits_CV.shape[1]), -torch.inf)
    return logits_CV


class _LinearLogp(torch.autograd.Function):
    """Chunked over rows; d logp/dz = onehot − p and dH/dz = −p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        forbidden: Tensor | None,
        support: Tensor | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        logp = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden.dtype))
        entropy, lse = torch.empty_like(logp), torch.empty_like(logp)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            kept_CW = None if support is None else support[rows]
            logits_CV = _chunk_logits(hidden[rows], weight, bias, temperature, forbidden, kept_CW)
            lse[rows] = logits_CV.logsumexp(dim=-1)
            logp[rows] = logits_CV.gather(1, targets[rows].unsqueeze(1)).squeeze(1) - lse[rows]
            logp_CV = logits_CV.sub_(lse[rows].unsqueeze(1))
            entropy[rows] = -(logp_CV.exp() * logp_CV.clamp_min_(LOGP_FLOOR)).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, forbidden, support, lse, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp, grad_entropy = grads
        hidden, weight, bias, targets, forbidden, support, lse, entropy = ctx.saved_tensors
        acc = accumulator(hidden.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=acc) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            kept_CW = None if support is None else support[rows]
            logp_CV = _chunk_logits(hidden[rows], weight, bias, ctx.temperature, forbidden, kept_CW)
            logp_CV = logp_CV.sub_(lse[rows].unsqueeze(1))
            grad_CV = _logits_gradient(logp_CV, targets, entropy, grad_logp, grad_entropy, rows)
            grad_CV /= ctx.temperature
            if forbidden is not None:
                grad_CV.index_fill_(1, forbidden, 0.0)
            if grad_bias is not None:
                grad_bias += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_CV @ weight
            if grad_weight is not None:
                grad_weight += grad_CV.t() @ hidden[rows]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 5


def _logits_gradient(
    logp_CV: Tensor,
    targets: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    rows: slice,
) -> Tensor:
    """dL/dz of one chunk from dL/dlogp and dL/dH."""
    probability_CV = logp_CV.exp()
    grad_CV = torch.zeros_like(logp_CV)
    if grad_entropy is not None:
        grad_CV += logp_CV.clamp_min(LOGP_FLOOR).add_(entropy[rows].unsqueeze(1))
        grad_CV *= probability_CV * -grad_entropy[rows].unsqueeze(1)
    if grad_logp is not None:
        grad_C1 = grad_logp[rows].unsqueeze(1)
        grad_CV -= probability_CV * grad_C1
        grad_CV.scatter_add_(1, targets[rows].unsqueeze(1), grad_C1)
    return grad_CV
