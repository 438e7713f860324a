"""Shared-prefix attention as two variable-length calls merged by log-sum-exp, forward and backward.

With (o₁, l₁) the output and log-sum-exp of a response row over its own keys, (o₂, l₂) over its prefix:
    l = log(e^l₁ + e^l₂),  o = o₁ + σ(l₂ − l₁) (o₂ − o₁).
Softmax attention's backward needs its output and log-sum-exp alone, and P = exp(s − l) is the probability over *all*
keys in either call; so both backward calls are given the merged o and l, and their gradients add up.  Keys and values
of a prefix are stored once per group; nothing is copied per response, and no mask exists.

Source: Hydragen (arXiv 2402.05099) and Cascade inference for the merge; FlashAttention-2 (2307.08691) for the backward.

Dims: `T` tokens, `Tp` prefix tokens, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .varlen import Plan, VarlenCall


class Provider(Protocol):
    """Who computes one variable-length call. Log-sum-exps are [queries, H], of any strides."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        """Output [queries, H, E] and log-sum-exp; 0 and -inf for `call.blind_queries`."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v; 0 for `call.blind_queries` and `call.blind_keys`. They may be written to."""
        ...


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds the attention over other keys, in place: out [N, H, E], lse [N, H]."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    if out.dtype == weight.dtype:
        out.lerp_(other_out, weight)
    else:
        out.copy_(torch.lerp(out.to(weight.dtype), other_out.to(weight.dtype), weight))
    lse.copy_(torch.logaddexp(lse, other_lse))


def forward(provider: Provider, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and merged log-sum-exp [T, H]."""
    out, lse = provider.forward(q, k, v, plan.own, scale)
    if plan.cross is not None:
        end = plan.num_prefix_tokens
        merge_(out[end:], lse[end:], *provider.forward(q[end:], k[:end], v[:end], plan.cross, scale))
    return out, lse


def backward(
    provider: Provider,
    plan: Plan,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, H, E], k and v [T, K, E], from the merged output and log-sum-exp."""
    dq, dk, dv = provider.backward(grad, q, k, v, out, lse, plan.own, scale)
    if plan.cross is not None:
        end = plan.num_prefix_tokens
        more_q, more_k, more_v = provider.backward(
            grad[end:], q[end:], k[:end], v[:end], out[end:], lse[end:], plan.cross, scale
        )
        dq[end:] += more_q
        dk[:end] += more_k
        dv[:end] += more_v
    return dq, dk, dv
