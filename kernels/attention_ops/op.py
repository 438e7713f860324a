"""Registered op `syncr1::shared_prefix_attention` and its backward as an op of its own, for CPU and CUDA tensors.

The three offset tensors are on the host: they say how the kernels are called, and reading them makes no GPU wait.

Dims: `T` tokens, `P` prefixes, `S` responses, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import refuse
from ..ops.logp import refuse_second_derivative
from ..ops.register import differentiates, differentiates_no_further, fakes, implements, registered
from . import cpu, cuda, two_calls
from .plan import Plan, plan_of

OP = "shared_prefix_attention"
Three = tuple[Tensor, Tensor, Tensor]


def _provider(q: Tensor) -> Any:
    return cuda.Flash(cuda.kernels()) if q.device.type == "cuda" else cpu


def _plan(q: Tensor, cu_prefixes: Tensor, cu_seqlens: Tensor, group_offsets: Tensor) -> Plan:
    plan = plan_of(cu_prefixes, cu_seqlens, group_offsets)
    if q.shape[0] != plan.num_tokens:
        refuse(OP, "q.shape[0]", plan.num_tokens, q.shape[0], "is the layout that of this batch?")
    return plan


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read the last dimension as if it were dense; torch's CPU one does not even check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.device.type == "cuda":
        return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype).t()
    return q.new_empty(q.shape[:2], dtype=dtype)


@implements(
    OP,
    (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_prefixes, Tensor cu_seqlens, Tensor group_offsets, float scale)"
        " -> (Tensor, Tensor)"
    ),
)
def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_prefixes: Tensor, cu_seqlens: Tensor, group_offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [T, H, E], log-sum-exp [T, H] float32 or float64, nats)."""
    plan = _plan(q, cu_prefixes, cu_seqlens, group_offsets)
    if plan.num_tokens == 0:
        return q.new_empty(q.shape), _empty_lse(q)
    return two_calls.forward(_provider(q), plan, _unit_stride(q), _unit_stride(k), _unit_stride(v), scale)


@fakes(OP)
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_prefixes: Tensor, cu_seqlens: Tensor, group_offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _empty_lse(q)


@implements(
    f"{OP}_backward",
    (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_prefixes, Tensor cu_seqlens,"
        " Tensor group_offsets, float scale) -> (Tensor, Tensor, Tensor)"
    ),
)
def shared_prefix_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_prefixes: Tensor,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    scale: float,
) -> Three:
    """Gradients of q [T, H, E], k and v [T, K, E]."""
    plan = _plan(q, cu_prefixes, cu_seqlens, group_offsets)
    if plan.num_tokens == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    return two_calls.backward(_provider(q), plan, grad.contiguous(), q, k, v, out, lse, scale)


@fakes(f"{OP}_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_prefixes: Tensor,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    scale: float,
) -> Three:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(OP)
    if grad is None:
        return (None,) * 7
    q, k, v, cu_prefixes, cu_seqlens, group_offsets, out, lse = ctx.saved_tensors
    grads = registered.shared_prefix_attention_backward(
        grad, q, k, v, out, lse, cu_prefixes, cu_seqlens, group_offsets, ctx.scale
    )
    return (*grads, None, None, None, None)


differentiates(OP, _save, _differentiate)
differentiates_no_further(f"{OP}_backward")
