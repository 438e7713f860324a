"""Shared-prefix attention as two variable-length calls merged by log-sum-exp, forward and backward.

Where some tokens see each other whole, the call over a row's own keys is itself merged of several, in the same way.

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

from .varlen import Own, Part, Plan, VarlenCall

Three = tuple[Tensor, Tensor, Tensor]


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


def empty_lse(q: Tensor) -> Tensor:
    """[N, H] for q [N, H, E], strided as the device's kernels have it."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.device.type == "cuda":
        return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype).t()
    return q.new_empty(q.shape[:2], dtype=dtype)


def _within(provider: Provider, own: Own, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of segments over their own keys, all on one axis."""

    def of(part: Part) -> tuple[Tensor, Tensor]:
        return provider.forward(q[part.queries], k[part.keys], v[part.keys], part.call, scale)

    if len(own.disjoint) == 1:
        out, lse = of(own.disjoint[0])
    else:
        out, lse = q.new_zeros(q.shape), empty_lse(q).fill_(-torch.inf)
        for part in own.disjoint:  # all others have 0 and -inf at a row's place
            more, more_lse = of(part)
            out[part.queries] += more
            lse[part.queries] = torch.maximum(lse[part.queries], more_lse)
    for part in own.further:
        merge_(out[part.queries], lse[part.queries], *of(part))
    return out, lse


def forward(provider: Provider, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and merged log-sum-exp [T, H]."""
    out, lse = _within(provider, plan.own, q, k, v, scale)
    if plan.cross is not None:
        end = plan.num_prefix_tokens
        merge_(out[end:], lse[end:], *provider.forward(q[end:], k[:end], v[:end], plan.cross, scale))
    return out, lse


def over_cache(
    provider: Provider,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    scale: float,
) -> Tensor:
    """Output [Tr, H, E] of the responses, from q, k, v of them alone and keys and values [K, Tp, E] of the prefixes."""
    out, lse = _within(provider, plan.responses, q, k, v, scale)
    if plan.cross is not None:
        keys, values = (x.transpose(0, 1) for x in (prefix_keys, prefix_values))
        merge_(out, lse, *provider.forward(q, keys, values, plan.cross, scale))
    return out


def _add_(total: Three, more: Three, queries: slice, keys: slice) -> None:
    for whole, part, rows in zip(total, more, (queries, keys, keys), strict=True):
        whole[rows] += part


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
) -> Three:
    """Gradients of q [T, H, E], k and v [T, K, E], from the merged output and log-sum-exp."""

    def of(call: VarlenCall, queries: slice, keys: slice) -> Three:
        query_side = (grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries])
        return provider.backward(*query_side, call, scale)

    parts = [*plan.own.disjoint, *plan.own.further]
    if plan.cross is not None:
        end = plan.num_prefix_tokens
        parts.append(Part(plan.cross, slice(end, None), slice(0, end)))
    if len(plan.own.disjoint) == 1:
        grads = of(*parts.pop(0))
    else:
        grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for part in parts:
        _add_(grads, of(*part), part.queries, part.keys)
    return grads
