"""`selective_logp` and `linear_logp`, with their backward passes as registered ops of their own.

The forward returns the log-sum-exp beside log-probability and entropy; the backward needs nothing else:
d logp/dz = onehot − p and dH/dz = −p (log p + H). Backends `native` and `triton`; `reference` is ordinary autograd,
called directly.

Dims: `N` rows, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_forbidden, check_logits, check_rows, check_support, check_supported, check_targets
from ..dispatch import choose, module_of, refuse_transforms, same_device
from ..linear import backward_rows, score_hidden
from ..ranges import TEMPERATURE
from ..reference import logp as reference
from ..register import differentiates, differentiates_no_further, fakes, flatten, implements, registered
from ..terms import Head

Three = tuple[Tensor, Tensor, Tensor]


class LogitInputs(NamedTuple):
    """What `selective_logp` is given: arguments of the registered op."""

    logits: Tensor
    """[N, V]."""
    targets: Tensor
    """[N]."""
    temperature: float
    forbidden: Tensor | None
    """[F]."""
    support: Tensor | None
    """[N, ceil(V/32)]."""
    backend: str

    @property
    def head(self) -> Head:
        return Head(None, self.temperature, self.forbidden, _contiguous(self.support))


class HiddenInputs(NamedTuple):
    """What `linear_logp` is given: arguments of the registered op."""

    hidden: Tensor
    """[N, D]."""
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    targets: Tensor
    """[N]."""
    temperature: float
    forbidden: Tensor | None
    """[F]."""
    support: Tensor | None
    """[N, ceil(V/32)]."""
    backend: str

    @property
    def head(self) -> Head:
        return Head(self.bias, self.temperature, self.forbidden, _contiguous(self.support))


class RowGradients(NamedTuple):
    """What a backward needs beside the inputs: results of the forward, and gradients of the first two, [N] each."""

    lse: Tensor
    entropy: Tensor
    grad_logp: Tensor | None
    grad_entropy: Tensor | None


class LogitGradientInputs(NamedTuple):
    """Arguments of the registered backward of `selective_logp`."""

    inputs: LogitInputs
    rows: RowGradients


class HiddenGradientInputs(NamedTuple):
    """Arguments of the registered backward of `linear_logp`."""

    inputs: HiddenInputs
    rows: RowGradients
    needs: Sequence[bool]
    """Whether hidden, weight and bias need a gradient."""


def refuse_second_derivative(op: str) -> None:
    """A gradient that is itself differentiated would be wrong in silence: it is a constant to autograd."""
    refuse_transforms(op)  # torch.autograd.grad(is_grads_batched=True)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: its gradient cannot be differentiated again; use backend='reference' with create_graph=True"
        )


def selective_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    support: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of tokens from logits.

    Equivalent PyTorch:
        logp_all = (logits.float() / temperature).log_softmax(-1)
        logp = logp_all.gather(1, targets[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    Args:
        logits: [N, V] float; with gradient.
        targets: [N] int in [0, V).
        temperature: finite, > 0.
        forbidden: [F] int64 vocabulary ids whose logits are taken as -inf.
        support: as in `linear_logp`.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        (logp [N], entropy [N]), nats, float32 (float64 for float64 input).

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: TRL's `selective_log_softmax`.
    """
    op = "selective_logp"
    same_device(op, logits=logits, targets=targets, forbidden=forbidden, support=support)
    check_logits(op, logits)
    TEMPERATURE.check(op, "temperature", temperature)
    inputs = LogitInputs(logits, targets, float(temperature), forbidden, support, choose(op, backend, logits))
    if inputs.backend == "reference":
        _check_ids(op, targets, logits.shape, forbidden, support)
        return reference.selective_logp(
            logits, targets, temperature=inputs.temperature, forbidden=forbidden, support=support
        )
    logp, entropy, _ = registered.selective_logp(*inputs)
    return logp, entropy


def _check_ids(
    op: str, targets: Tensor, shape: Sequence[int], forbidden: Tensor | None, support: Tensor | None
) -> None:
    """`shape` is (N, V)."""
    num_rows, vocabulary = shape
    check_targets(op, targets, num_rows, vocabulary)
    check_forbidden(op, forbidden, vocabulary)
    check_support(op, support, num_rows, vocabulary)
    check_supported(op, targets, support, forbidden)


@implements("selective_logp", LogitInputs, "(Tensor, Tensor, Tensor)")
def score_logits(inputs: LogitInputs) -> Three:
    """(logp [N] float32, entropy [N] float32, logsumexp [N] float64)."""
    logits, targets = inputs.logits, inputs.targets
    _check_ids("selective_logp", targets, logits.shape, inputs.forbidden, inputs.support)
    kernels = module_of(inputs.backend)
    scored: Three = kernels.score_rows(_unit_stride(logits), targets.long().contiguous(), inputs.head)
    return scored


@fakes("selective_logp", LogitInputs)
def _(inputs: LogitInputs) -> Three:
    return _per_row(inputs.logits)


def _per_row(like: Tensor) -> Three:
    logp, entropy = (like.new_empty(like.shape[:1], dtype=torch.float32) for _ in range(2))
    return logp, entropy, like.new_empty(like.shape[:1], dtype=torch.float64)


@implements("selective_logp_backward", LogitGradientInputs, "Tensor")
def logits_gradient(given: LogitGradientInputs) -> Tensor:
    """[N, V], dtype of the logits."""
    inputs, rows = given
    out = torch.empty(inputs.logits.shape, dtype=inputs.logits.dtype, device=inputs.logits.device)
    module_of(inputs.backend).gradient_rows(
        _unit_stride(inputs.logits),
        inputs.targets.long().contiguous(),
        inputs.head,
        rows.lse,
        rows.entropy,
        _float(rows.grad_logp),
        _float(rows.grad_entropy),
        out,
    )
    return out


@fakes("selective_logp_backward", LogitGradientInputs)
def _(given: LogitGradientInputs) -> Tensor:
    logits = given.inputs.logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_selective(ctx: Any, inputs: LogitInputs, output: Three) -> None:
    _, entropy, lse = output
    ctx.save_for_backward(inputs.logits, inputs.targets, inputs.forbidden, inputs.support, lse, entropy)
    ctx.temperature, ctx.backend = inputs.temperature, inputs.backend
    ctx.set_materialize_grads(False)


def _differentiate_selective(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor]:
    refuse_second_derivative("selective_logp")
    if grad_logp is None and grad_entropy is None:
        return {}
    logits, targets, forbidden, support, lse, entropy = ctx.saved_tensors
    inputs = LogitInputs(logits, targets, ctx.temperature, forbidden, support, ctx.backend)
    given = LogitGradientInputs(inputs, RowGradients(lse, entropy, grad_logp, grad_entropy))
    return {"logits": registered.selective_logp_backward(*flatten(given))}


differentiates("selective_logp", LogitInputs, _save_selective, _differentiate_selective)
differentiates_no_further("selective_logp_backward")


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    support: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of tokens from hidden states, without storing the logits.

    Equivalent PyTorch:
        logp_all = (F.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
        logp = logp_all.gather(1, targets[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(-1)

    Args:
        hidden: [N, D] float; with gradient.
        weight: [V, D], dtype of `hidden`; with gradient.
        targets: [N] int in [0, V).
        bias: [V] or None; with gradient.
        temperature: finite, > 0.
        forbidden: [F] int64 vocabulary ids whose logits are -inf; a forbidden target has log-probability -inf.
        support: [N, ceil(V/32)] int32, the ids that each row's token was drawn from (`CFGSample.support`): both results
            are those of the distribution renormalised over them, the gradient is 0 at the others. A set without its
            own target, or one that `forbidden` excludes, is an error where values are checked; elsewhere (a GPU) such
            a target has log-probability -inf.
        backend: see `syncr1.kernels.dispatch`.

    Returns:
        (logp [N], entropy [N]), nats, float32 (float64 for float64 input), both with gradient.

    Raises:
        ValueError: a shape, dtype or value is out of place.

    Source: chunked as in Cut Your Losses (arXiv 2411.09009) and Liger's fused losses.
    """
    op = "linear_logp"
    same_device(op, hidden=hidden, weight=weight, targets=targets, bias=bias, forbidden=forbidden, support=support)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    check_rows(op, hidden, weight, targets, bias)
    TEMPERATURE.check(op, "temperature", temperature)
    chosen = choose(op, backend, hidden, weight)
    inputs = HiddenInputs(hidden, weight, bias, targets, float(temperature), forbidden, support, chosen)
    if chosen == "reference":
        _check_ids(op, targets, (hidden.shape[0], weight.shape[0]), forbidden, support)
        return reference.linear_logp(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=inputs.temperature,
            forbidden=forbidden,
            support=support,
        )
    logp, entropy, _ = registered.linear_logp(*inputs)
    return logp, entropy


def cast_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a head in the autocast dtype, as `nn.Linear` has them, where autocast is on."""
    device = hidden.device.type
    # Meta tensors are shapes alone: their device has no autocast.
    if device == "meta" or not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@implements("linear_logp", HiddenInputs, "(Tensor, Tensor, Tensor)")
def score_head(inputs: HiddenInputs) -> Three:
    """(logp [N] float32, entropy [N] float32, logsumexp [N] float64)."""
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    _check_ids("linear_logp", targets, (hidden.shape[0], weight.shape[0]), inputs.forbidden, inputs.support)
    return score_hidden(module_of(inputs.backend), hidden, weight, targets.long().contiguous(), inputs.head)


@fakes("linear_logp", HiddenInputs)
def _(inputs: HiddenInputs) -> Three:
    return _per_row(inputs.hidden)


@implements("linear_logp_backward", HiddenGradientInputs, "(Tensor, Tensor, Tensor)")
def head_gradient(given: HiddenGradientInputs) -> Three:
    """Gradients of hidden, weight and bias; empty where `needs` says no."""
    inputs, rows, needs = given
    return backward_rows(
        module_of(inputs.backend),
        inputs.hidden,
        inputs.weight,
        inputs.targets.long().contiguous(),
        inputs.head,
        rows.lse,
        rows.entropy,
        _float(rows.grad_logp),
        _float(rows.grad_entropy),
        needs,
    )


@fakes("linear_logp_backward", HiddenGradientInputs)
def _(given: HiddenGradientInputs) -> Three:
    wanted = [part if need else None for part, need in zip(given.inputs[:3], given.needs, strict=True)]
    like = [given.inputs.hidden.new_empty(0) if part is None else part.new_empty(part.shape) for part in wanted]
    return like[0], like[1], like[2]


def _save_linear(ctx: Any, inputs: HiddenInputs, output: Three) -> None:
    _, entropy, lse = output
    tensors = (inputs.hidden, inputs.weight, inputs.bias, inputs.targets, inputs.forbidden, inputs.support)
    ctx.save_for_backward(*tensors, lse, entropy)
    ctx.temperature, ctx.backend = inputs.temperature, inputs.backend
    ctx.set_materialize_grads(False)


def _differentiate_linear(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor | None]:
    refuse_second_derivative("linear_logp")
    if grad_logp is None and grad_entropy is None:
        return {}
    hidden, weight, bias, targets, forbidden, support, lse, entropy = ctx.saved_tensors
    inputs = HiddenInputs(hidden, weight, bias, targets, ctx.temperature, forbidden, support, ctx.backend)
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    given = HiddenGradientInputs(inputs, RowGradients(lse, entropy, grad_logp, grad_entropy), needs)
    grads = zip(("hidden", "weight", "bias"), registered.linear_logp_backward(*flatten(given)), needs, strict=True)
    return {name: grad for name, grad, need in grads if need}


differentiates("linear_logp", HiddenInputs, _save_linear, _differentiate_linear)
differentiates_no_further("linear_logp_backward")


def _contiguous(support: Tensor | None) -> Tensor | None:
    return None if support is None else support.contiguous()


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
