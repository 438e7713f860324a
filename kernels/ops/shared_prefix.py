"""`shared_prefix_attention`, and its backward as a registered op of its own, for CPU and CUDA tensors.

The tensors of a layout are on the host: they say how the kernels are called, and reading them makes no GPU wait.

Dims: `T` tokens, `P` prefixes, `S` responses, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..attention import OP, SharedPrefixLayout, choose_attention
from ..attention_ops import cpu, cuda, reference, two_calls
from ..attention_ops.varlen import Plan, plan_of
from ..checks import check_float, refuse
from ..ranges import ATTENTION_SCALE
from ..register import differentiates, differentiates_no_further, fakes, flatten, implements, registered
from .logp import refuse_second_derivative

Three = tuple[Tensor, Tensor, Tensor]


class AttentionInputs(NamedTuple):
    """Arguments of the registered op."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_prefixes: Tensor
    """This one and the next four: `SharedPrefixLayout.host_offsets`."""
    cu_seqlens: Tensor
    group_offsets: Tensor
    whole_prefixes: Tensor | None
    whole_responses: Tensor | None
    scale: float

    @property
    def plan(self) -> Plan:
        plan = plan_of(*self[3:8])
        if self.q.shape[0] != plan.num_tokens:
            refuse(OP, "q.shape[0]", plan.num_tokens, self.q.shape[0], "is the layout that of this batch?")
        return plan


class AttentionGradientInputs(NamedTuple):
    """Arguments of the registered backward."""

    inputs: AttentionInputs
    out: Tensor
    """[T, H, E]."""
    lse: Tensor
    """[T, H]."""
    grad: Tensor
    """Of `out`."""


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention in which the responses of a group share its prefix's keys and values.

    Equivalent PyTorch, for one group and as many key-value heads as query heads:
        segment = torch.repeat_interleave(torch.arange(1 + S), lengths_of_prefix_and_responses)
        place = torch.arange(T)
        last = torch.maximum(place, (first_place_of_segment + whole)[segment] - 1)
        seen = ((segment[:, None] == segment) | (segment == 0)) & (place <= last[:, None])
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)

    Args:
        q: [T, H, E] float; with gradient, of any strides.
        k: [T, K, E], dtype of `q`; with gradient. Query head h reads key-value head h // (H / K).
        v: [T, K, E], dtype of `q`; with gradient.
        layout: of the token axis [all prefixes | all responses].
        scale: finite, > 0; multiplies the scores; None = 1/√E.
        backend: "flash" is dense flash attention on the CPU, and on CUDA flash_attn's variable-length kernels, or
            PyTorch's where that is not installed or does not load (float16 and bfloat16; `attention_provider` says
            which); "reference" is plain PyTorch. None takes flash where it serves the tensors, unless
            SYNCR1_BACKEND=reference.

    Returns:
        [T, H, E], dtype of `q`.

    Raises:
        ValueError: a shape, dtype or value is out of place.
        BackendError: the backend that was asked for cannot serve the call.
        NotImplementedError: a gradient is differentiated again (only "reference" can).

    Source: two variable-length calls merged by log-sum-exp as in Hydragen (arXiv 2402.05099), with their backward.
    """
    # The kernels mask before they scale: 0 · -inf is NaN, and a negative scale would show what is hidden.
    ATTENTION_SCALE.check(OP, "scale", scale)
    check_operands(OP, q, k, v, layout.num_tokens, "the token axis is [all prefixes | all responses] of this layout")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_attention(backend, q) == "reference":
        return reference.attend(layout.plan, q, k, v, scale)
    out: Tensor = registered.shared_prefix_attention(*AttentionInputs(q, k, v, *layout.host_offsets, scale))[0]
    return out


def check_operands(op: str, q: Tensor, k: Tensor, v: Tensor, num_tokens: int, remedy: str) -> None:
    """Queries, keys and values of `num_tokens` tokens fit together."""
    check_float(op, "q", q)
    if q.dim() != 3 or q.shape[0] != num_tokens:
        refuse(op, "q", f"[{num_tokens}, H, E]", list(q.shape), remedy)
    if k.shape != v.shape:
        refuse(op, "v", list(k.shape), list(v.shape), "keys and values have one shape")
    if k.dim() != 3 or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        refuse(op, "k", f"[{q.shape[0]}, K, {q.shape[2]}]", list(k.shape), "one key per token, of the queries' size")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] == 0:
        got = f"H {q.shape[1]}, K {k.shape[1]}, E {q.shape[2]}"
        refuse(op, "the number of query heads", "a multiple of the number of key-value heads", got, "check the heads")
    for name, x in (("k", k), ("v", v)):
        if (x.dtype, x.device) != (q.dtype, q.device):
            refuse(op, name, f"{q.dtype} on {q.device}", f"{x.dtype} on {x.device}", "convert it with .to(q)")


def provider_of(q: Tensor) -> Any:
    return cuda.Flash(cuda.kernels()) if q.device.type == "cuda" else cpu


def unit_stride(x: Tensor) -> Tensor:
    """The kernels read the last dimension as if it were dense; torch's CPU one does not even check."""
    return x if x.stride(-1) == 1 else x.contiguous()


@implements(OP, AttentionInputs, "(Tensor, Tensor)")
def attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(output [T, H, E], log-sum-exp [T, H] float32 or float64, nats)."""
    q, plan = inputs.q, inputs.plan
    if plan.num_tokens == 0:
        return q.new_empty(q.shape), two_calls.empty_lse(q)
    q, k, v = map(unit_stride, inputs[:3])
    return two_calls.forward(provider_of(q), plan, q, k, v, inputs.scale)


@fakes(OP, AttentionInputs)
def _(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    return inputs.q.new_empty(inputs.q.shape), two_calls.empty_lse(inputs.q)


@implements(f"{OP}_backward", AttentionGradientInputs, "(Tensor, Tensor, Tensor)")
def attend_backward(given: AttentionGradientInputs) -> Three:
    """Gradients of q [T, H, E], k and v [T, K, E]."""
    inputs, out, lse, grad = given
    plan = inputs.plan
    if plan.num_tokens == 0:
        return _empty_gradients(given)
    q, k, v = map(unit_stride, inputs[:3])
    return two_calls.backward(provider_of(q), plan, grad.contiguous(), q, k, v, out, lse, inputs.scale)


@fakes(f"{OP}_backward", AttentionGradientInputs)
def _empty_gradients(given: AttentionGradientInputs) -> Three:
    q, k, v = given.inputs[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: AttentionInputs, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> dict[str, Tensor]:
    refuse_second_derivative(OP)
    if grad is None:
        return {}
    *tensors, out, lse = ctx.saved_tensors
    given = AttentionGradientInputs(AttentionInputs._make([*tensors, ctx.scale]), out, lse, grad)
    grads = registered.shared_prefix_attention_backward(*flatten(given))
    return dict(zip(("q", "k", "v"), grads, strict=True))


differentiates(OP, AttentionInputs, _save, _differentiate)
differentiates_no_further(f"{OP}_backward")
