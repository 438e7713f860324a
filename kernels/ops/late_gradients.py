"""Registered op `syncr1::linear_grpo_loss_backward`: the gradients of float16 heads, formed in backward.

The one sweep of `linear_grpo_loss` forms d loss / d logits before autograd knows the scale of the loss, and without it
they are below what float16 holds. Here they come from d loss / d logp, float32, times that scale: four products, not
three.

Dims: `T` packed tokens, `N` rows of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import module_of
from ..linear import HeadRows, Workspace, chosen_rows, gradient_pass
from ..register import differentiates_no_further, fakes, flatten, implements, registered
from ..streams import MODALITIES, TokenStream
from ..terms import Head

OP = "linear_grpo_loss_backward"
NUM_TENSORS = 7
"""Lists of tensors at the beginning of `StreamLists`."""


class StreamLists(NamedTuple):
    """The streams as torch's ops take them: one entry per stream in each list, an empty tensor where there is none,
    because autograd takes lists of tensors, not of tensors and None."""

    hidden: Sequence[Tensor]
    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    targets: Sequence[Tensor]
    rows: Sequence[Tensor]
    forbidden: Sequence[Tensor]
    support: Sequence[Tensor]
    temperature: Sequence[float]
    stream_modality: Sequence[int]

    @classmethod
    def of(cls, streams: Sequence[TokenStream]) -> StreamLists:
        nothing, nowhere = streams[0].hidden.new_empty(0), streams[0].targets.new_empty(0, dtype=torch.int64)
        return cls(
            [s.hidden for s in streams],
            [s.weight for s in streams],
            [nothing if s.bias is None else s.bias for s in streams],
            [s.targets for s in streams],
            [s.rows for s in streams],
            [nowhere if s.forbidden is None else s.forbidden for s in streams],
            [nowhere.int() if s.support is None else s.support for s in streams],
            [float(s.temperature) for s in streams],
            [MODALITIES.index(s.modality) for s in streams],
        )

    def records(self) -> list[TokenStream]:
        """The inverse of `of`."""
        return [
            TokenStream(h, w, t, r, _given(b), float(tau), MODALITIES[m], _given(f), _given(s))
            for h, w, b, t, r, f, s, tau, m in zip(*self, strict=True)
        ]


def _given(part: Tensor) -> Tensor | None:
    return part if part.numel() else None


def head_of(stream: TokenStream) -> Head:
    """How the stream's products become logits."""
    support = None if stream.support is None else stream.support.contiguous()
    return Head(stream.bias, stream.temperature, stream.forbidden, support)


class LateGradientInputs(NamedTuple):
    """Arguments of the registered op."""

    streams: StreamLists
    grad_logp: Tensor
    """[T]."""
    lse: Tensor
    """[T]."""
    entropy: Tensor
    """[T]."""
    needs: Sequence[bool]
    """Whether hidden, weight and bias of each stream in turn need a gradient."""
    backend: str


def formed_late(streams: StreamLists) -> bool:
    """The gradients of these heads wait for the scale of the loss."""
    return any(hidden.dtype == torch.float16 for hidden in streams.hidden)


@implements(OP, LateGradientInputs, "Tensor[]", reads_back=True)  # how many rows have a gradient
def form_gradients(given: LateGradientInputs) -> list[Tensor]:
    """Gradients of hidden, weight and bias of each stream in turn, empty where `needs` says no."""
    kernels, flat, streams = module_of(given.backend), list[Tensor](), given.streams.records()
    positions = [stream.rows.long() for stream in streams]
    grads = [given.grad_logp[at] for at in positions]
    heads = [HeadRows(s.hidden, s.weight, s.targets.long().contiguous(), head_of(s)) for s in streams]
    chosen = chosen_rows([grad_N != 0 for grad_N in grads])
    live = [head if own is None else head.subset(own) for head, own in zip(heads, chosen, strict=True)]
    with Workspace(live) as workspace:
        for index, (head, grad_N, at, own) in enumerate(zip(live, grads, positions, chosen, strict=True)):
            if own is not None:
                at, grad_N = at[own], grad_N[own]
            wanted = given.needs[3 * index : 3 * index + 3]
            lse_N, entropy_N = given.lse[at], given.entropy[at]
            flat += gradient_pass(kernels, head, workspace, lse_N, entropy_N, grad_N, None, wanted)
    return flat


@fakes(OP, LateGradientInputs)
def _(given: LateGradientInputs) -> list[Tensor]:
    return empty_gradients(given.streams, given.needs)


def empty_gradients(streams: StreamLists, needs: Sequence[bool]) -> list[Tensor]:
    """Shapes of the gradients of hidden, weight and bias of each stream in turn."""
    parts = [part for triple in zip(*streams[:3], strict=True) for part in triple]
    return [part.new_empty(part.shape if need else 0) for part, need in zip(parts, needs, strict=True)]


differentiates_no_further(OP)


def save(ctx: Any, streams: StreamLists, backend: str, grad_logp: Tensor, lse: Tensor, entropy: Tensor) -> None:
    """Keeps what `gradients` needs."""
    tensors, ctx.others, ctx.backend = streams[:NUM_TENSORS], streams[NUM_TENSORS:], backend
    ctx.save_for_backward(grad_logp, lse, entropy, *(tensor for each in tensors for tensor in each))


def gradients(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor]:
    """Of hidden, weight and bias of each stream in turn."""
    grad_logp, lse, entropy, *rest = ctx.saved_tensors
    count = len(rest) // NUM_TENSORS
    streams = StreamLists(*(rest[start : start + count] for start in range(0, len(rest), count)), *ctx.others)
    scaled = grad_logp * grad_loss.to(grad_logp.dtype)
    given = LateGradientInputs(streams, scaled, lse, entropy, ctx.needs, ctx.backend)
    formed: Sequence[Tensor] = registered.linear_grpo_loss_backward(*flatten(given))
    return formed
