"""Registered op `syncr1::linear_grpo_loss_backward`: the gradients of float16 heads, formed in backward.

The one sweep of `linear_grpo_loss` forms d loss / d logits before autograd knows the scale of the loss, and without it
they are below what float16 holds. Here they come from d loss / d logp, float32, times that scale: four products, not
three.

Dims: `T` packed tokens, `N` rows of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import module_of
from ..linear import HeadRows, Workspace, chosen_rows, gradient_pass
from ..terms import Head
from .register import differentiates_no_further, fakes, implements, registered

OP = "linear_grpo_loss_backward"


def formed_late(hidden: Sequence[Tensor]) -> bool:
    """The gradients of these heads wait for the scale of the loss."""
    return any(h.dtype == torch.float16 for h in hidden)


@implements(
    OP,
    (
        "(Tensor[] hidden, Tensor[] weight, Tensor[] bias, Tensor[] targets, Tensor[] rows, Tensor[] forbidden,"
        " float[] temperature, Tensor grad_logp, Tensor lse, Tensor entropy, bool[] needs, str backend) -> Tensor[]"
    ),
    reads_back=True,  # how many rows have a gradient
)
def linear_grpo_loss_backward(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Tensor],
    forbidden: Sequence[Tensor],
    temperature: Sequence[float],
    grad_logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias of each stream in turn, from [T] values; empty where `needs` says no."""
    kernels, flat = module_of(backend), list[Tensor]()
    positions = [at.long() for at in rows]
    grads = [grad_logp[at] for at in positions]
    heads = [
        HeadRows(h, w, t.long().contiguous(), Head(b if b.numel() else None, float(tau), f if f.numel() else None))
        for h, w, b, t, f, tau in zip(hidden, weight, bias, targets, forbidden, temperature, strict=True)
    ]
    chosen = chosen_rows([grad_N != 0 for grad_N in grads])
    live = [head if own is None else head.subset(own) for head, own in zip(heads, chosen, strict=True)]
    with Workspace(live) as workspace:
        for index, (head, grad_N, at, own) in enumerate(zip(live, grads, positions, chosen, strict=True)):
            if own is not None:
                at, grad_N = at[own], grad_N[own]
            wanted = needs[3 * index : 3 * index + 3]
            flat += gradient_pass(kernels, head, workspace, lse[at], entropy[at], grad_N, None, wanted)
    return flat


@fakes(OP)
def _(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[Tensor],
    forbidden: Sequence[Tensor],
    temperature: Sequence[float],
    grad_logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    parts = [part for triple in zip(hidden, weight, bias, strict=True) for part in triple]
    return [part.new_empty(part.shape if need else 0) for part, need in zip(parts, needs, strict=True)]


differentiates_no_further(OP)


def save(ctx: Any, inputs: tuple[Any, ...], grad_logp: Tensor, lse: Tensor, entropy: Tensor) -> None:
    """Keeps what `gradients` needs of the inputs of `linear_grpo_loss`."""
    lists = inputs[:6]
    ctx.save_for_backward(grad_logp, lse, entropy, *(tensor for tensors in lists for tensor in tensors))
    ctx.temperature, ctx.backend = inputs[6], inputs[22]


def gradients(ctx: Any, grad_loss: Tensor) -> Iterator[Tensor]:
    """Of hidden, weight and bias of each stream in turn."""
    (grad_logp, lse, entropy), rest = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    lists = [list(rest[index : index + ctx.num_streams]) for index in range(0, len(rest), ctx.num_streams)]
    scaled = grad_logp * grad_loss.to(grad_logp.dtype)
    yield from registered.linear_grpo_loss_backward(
        *lists, ctx.temperature, scaled, lse, entropy, ctx.needs, ctx.backend
    )
