"""Registered ops `syncr1::selective_logp` and `syncr1::linear_logp`, with their backward passes as ops of their own.

The forward returns the log-sum-exp beside log-probability and entropy; the backward needs nothing else:
d logp/dz = onehot − p and dH/dz = −p (log p + H). Backends `native` and `triton`; `reference` is ordinary autograd.

Dims: `N` rows, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_forbidden, check_targets
from ..dispatch import module_of, refuse_transforms
from ..linear import backward_rows, score_hidden
from ..terms import Head
from .register import differentiates, differentiates_no_further, fakes, implements, registered

Three = tuple[Tensor, Tensor, Tensor]


def refuse_second_derivative(op: str) -> None:
    """A gradient that is itself differentiated would be wrong in silence: it is a constant to autograd."""
    refuse_transforms(op)  # torch.autograd.grad(is_grads_batched=True)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: its gradient cannot be differentiated again; use backend='reference' with create_graph=True"
        )


def _per_row(like: Tensor) -> Three:
    logp, entropy = (like.new_empty(like.shape[:1], dtype=torch.float32) for _ in range(2))
    return logp, entropy, like.new_empty(like.shape[:1], dtype=torch.float64)


@implements(
    "selective_logp",
    ("(Tensor logits, Tensor targets, float temperature, Tensor? forbidden, str backend) -> (Tensor, Tensor, Tensor)"),
)
def selective_logp(
    logits: Tensor, targets: Tensor, temperature: float, forbidden: Tensor | None, backend: str
) -> Three:
    """(logp [N] float32, entropy [N] float32, logsumexp [N] float64)."""
    check_targets("selective_logp", targets, logits.shape[0], logits.shape[1])
    check_forbidden("selective_logp", forbidden, logits.shape[1])
    head = Head(temperature=temperature, forbidden=forbidden)
    scored: Three = module_of(backend).score_rows(_unit_stride(logits), targets.long().contiguous(), head)
    return scored


@fakes("selective_logp")
def _(logits: Tensor, targets: Tensor, temperature: float, forbidden: Tensor | None, backend: str) -> Three:
    return _per_row(logits)


@implements(
    "selective_logp_backward",
    (
        "(Tensor logits, Tensor targets, Tensor lse, Tensor entropy, Tensor? grad_logp, Tensor? grad_entropy,"
        " float temperature, Tensor? forbidden, str backend) -> Tensor"
    ),
)
def selective_logp_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    backend: str,
) -> Tensor:
    """[N, V], dtype of the logits."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    module_of(backend).gradient_rows(
        _unit_stride(logits),
        targets.long().contiguous(),
        Head(temperature=temperature, forbidden=forbidden),
        lse,
        entropy,
        _float(grad_logp),
        _float(grad_entropy),
        out,
    )
    return out


@fakes("selective_logp_backward")
def _(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    logits, targets, ctx.temperature, forbidden, ctx.backend = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, targets, lse, entropy, forbidden)
    ctx.set_materialize_grads(False)


def _differentiate_selective(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("selective_logp")
    if grad_logp is None and grad_entropy is None:
        return (None,) * 5
    logits, targets, lse, entropy, forbidden = ctx.saved_tensors
    grad = registered.selective_logp_backward(
        logits, targets, lse, entropy, grad_logp, grad_entropy, ctx.temperature, forbidden, ctx.backend
    )
    return grad, None, None, None, None


differentiates("selective_logp", _save_selective, _differentiate_selective)
differentiates_no_further("selective_logp_backward")


@implements(
    "linear_logp",
    (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, Tensor? forbidden,"
        " str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    forbidden: Tensor | None,
    backend: str,
) -> Three:
    """(logp [N] float32, entropy [N] float32, logsumexp [N] float64)."""
    check_targets("linear_logp", targets, hidden.shape[0], weight.shape[0])
    check_forbidden("linear_logp", forbidden, weight.shape[0])
    head = Head(bias, temperature, forbidden)
    return score_hidden(module_of(backend), hidden, weight, targets.long().contiguous(), head)


@fakes("linear_logp")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    forbidden: Tensor | None,
    backend: str,
) -> Three:
    return _per_row(hidden)


@implements(
    "linear_logp_backward",
    (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, Tensor entropy, Tensor? grad_logp,"
        " Tensor? grad_entropy, float temperature, Tensor? forbidden, bool[] needs, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def linear_logp_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    needs: list[bool],
    backend: str,
) -> Three:
    """Gradients of hidden, weight and bias; empty where `needs` says no."""
    return backward_rows(
        module_of(backend),
        hidden,
        weight,
        targets.long().contiguous(),
        Head(bias, temperature, forbidden),
        lse,
        entropy,
        _float(grad_logp),
        _float(grad_entropy),
        needs,
    )


@fakes("linear_logp_backward")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    needs: list[bool],
    backend: str,
) -> Three:
    wanted = [part if need else None for part, need in zip((hidden, weight, bias), needs, strict=True)]
    like = [hidden.new_empty(0) if part is None else part.new_empty(part.shape) for part in wanted]
    return like[0], like[1], like[2]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    hidden, weight, bias, targets, ctx.temperature, forbidden, ctx.backend = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, bias, targets, forbidden, lse, entropy)
    ctx.set_materialize_grads(False)


def _differentiate_linear(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logp")
    if grad_logp is None and grad_entropy is None:
        return (None,) * 7
    hidden, weight, bias, targets, forbidden, lse, entropy = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = registered.linear_logp_backward(
        hidden, weight, bias, targets, lse, entropy, grad_logp, grad_entropy, ctx.temperature, forbidden, needs,
        ctx.backend,
    )  # fmt: skip
    hidden_grad, weight_grad, bias_grad = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return hidden_grad, weight_grad, bias_grad, None, None, None, None


differentiates("linear_logp", _save_linear, _differentiate_linear)
differentiates_no_further("linear_logp_backward")


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
