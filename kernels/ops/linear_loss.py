"""`linear_grpo_loss`: the row plan, the products of each head, the loss, the gradients; backward only scales.

Backends `native` and `triton`; `reference` is ordinary autograd, called directly but for meta tensors, which have no
values to select rows by.

Dims: `T` packed tokens, `S` sequences, `N` rows of a stream, `V` vocabulary, `D` hidden, `M` modalities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_stream_records, check_streams, refuse
from ..dispatch import choose, same_device
from ..layout import PackedLayout
from ..outputs import GRPOOutput
from ..plan import Rewards, by_modality, stream_layout
from ..ranges import TEMPERATURE
from ..reference import loss as reference
from ..register import differentiates, fakes, flatten, implements, registered
from ..streams import TokenStream
from ..terms import LossInputs
from . import late_gradients
from .late_gradients import StreamLists
from .linear_sweeps import OP, LinearLoss
from .logp import cast_operands, refuse_second_derivative
from .loss import empty_results, loss_dtype
from .loss_inputs import check_loss_inputs, encode_options, lists_options, loss_inputs, named_metrics

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]


class LinearLossInputs(NamedTuple):
    """Arguments of the registered op."""

    streams: StreamLists
    loss: LossInputs
    num_tokens: Annotated[int, "SymInt"]
    """T."""
    needs: Sequence[bool]
    """Whether hidden, weight and bias of each stream in turn need a gradient."""


@lists_options
def linear_grpo_loss(
    streams: Sequence[TokenStream],
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None = None,
    old_logp: Tensor | None = None,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> GRPOOutput:
    """`grpo_loss` straight from hidden states, one head per modality; `[tokens, vocabulary]` never exists whole.

    Equivalent PyTorch:
        logp = torch.zeros(T)
        for s in streams:
            logp[s.rows] = linear_logp(s.hidden, s.weight, s.targets, bias=s.bias, temperature=s.temperature,
                                       forbidden=s.forbidden, support=s.support)[0]
        output = grpo_loss(logp, old_logp, rewards, cu_seqlens, group_offsets, …)

    Args:
        streams: rows of each vocabulary; tokens that no stream covers carry no loss. Masked and pruned rows, and where
            there is no KL rows of advantage 0 (see `score_all`), are left out of the matrix products.
        modality: optional; must agree with the streams, which carry it.
        rewards, cu_seqlens, group_offsets, advantages, old_logp, loss_mask, ref_logp, is_ratio, weights, backend,
            **options: as in `grpo_loss`. Under `torch.compile` pass at least one of old_logp, loss_mask, modality and
            ref_logp: it tells T.

    Returns:
        GRPOOutput; `logp` and `entropy` are 0 at tokens that were left out, and metrics are means over the others.
        Token ratios take three matrix products per row; `ratio` "sequence" and "product", vespo and
        top_entropy_quantile need the rest of the sequence or batch first, float16 heads the scale of the loss, and take
        a fourth.

    Raises:
        ValueError: a shape, dtype or value is out of place, or a loss token's target is forbidden or outside its
            support.

    Source: as `grpo_loss`.
    """
    given = {
        "old_logp": old_logp,
        "rewards": rewards,
        "advantages": advantages,
        "cu_seqlens": cu_seqlens,
        "group_offsets": group_offsets,
        "loss_mask": loss_mask,
        "modality": modality,
        "ref_logp": ref_logp,
        "is_ratio": is_ratio,
        "entropy": None,
        "weights": weights,
    }
    same_device(OP, streams=streams, **given, num_items=options.get("num_items"))
    settings, num_items = encode_options(OP, options)
    check_stream_records(OP, streams)
    for stream in streams:
        TEMPERATURE.check(OP, "stream.temperature", stream.temperature)
    streams = [_autocast(stream) for stream in streams]
    inputs = loss_inputs(OP, given, settings, num_items, choose(OP, backend, *(s.hidden for s in streams)))
    num_tokens = _num_tokens(inputs)
    if inputs.backend == "reference" and not streams[0].hidden.is_meta:
        layout = _check(inputs.layout(num_tokens), streams, inputs)
        return reference.linear_grpo_loss(streams, inputs, layout)
    parts = [part for s in streams for part in (s.hidden, s.weight, s.bias)]
    needs = [part is not None and part.requires_grad and torch.is_grad_enabled() for part in parts]
    call = LinearLossInputs(StreamLists.of(streams), inputs, num_tokens, needs)
    loss, logp, entropy, advantages_MS, keep, values, _ = registered.linear_grpo_loss(*flatten(call))
    metrics = named_metrics(values.detach(), image=True, kl=ref_logp is not None, entropy=True)
    return GRPOOutput(loss, by_modality(advantages_MS.detach()), keep, metrics, logp.detach(), entropy.detach())


def _num_tokens(inputs: LossInputs) -> int:
    """T, where a tensor of that length tells it; else from cu_seqlens, which makes a GPU wait."""
    for values in (inputs.old_logp, inputs.loss_mask, inputs.modality, inputs.ref_logp):
        if values is not None:
            return values.shape[0]
    if inputs.cu_seqlens.is_meta:
        refuse(OP, "old_logp, loss_mask, modality or ref_logp", "given with meta tensors", None, "they tell T")
    return int(inputs.cu_seqlens[-1])


def _autocast(stream: TokenStream) -> TokenStream:
    """Under autocast a head runs in the autocast dtype, as `nn.Linear` does."""
    hidden, weight, bias = cast_operands(stream.hidden, stream.weight, stream.bias)
    if hidden is stream.hidden and weight is stream.weight and bias is stream.bias:
        return stream
    return replace(stream, hidden=hidden, weight=weight, bias=bias)


def _check(given: PackedLayout, streams: Sequence[TokenStream], inputs: LossInputs) -> PackedLayout:
    """Checks all values; the layout with the mask and modality that the streams give."""
    check_loss_inputs(OP, inputs, given)
    check_streams(OP, streams, given.num_tokens)
    return stream_layout(OP, streams, given)


@implements(
    OP,
    LinearLossInputs,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    reads_back=True,  # how many rows act; with an entropy quantile, how many tokens
)
def form_linear_loss(given: LinearLossInputs) -> Outputs:
    """(loss, logp [T], entropy [T], advantages [M, S], keep [S], metrics [18], gradients).

    Gradients are hidden, weight and bias of each stream in turn, empty where not needed. Of float16 heads there are
    d loss / d logp [T], log-sum-exp [T] and an empty tensor in their place.
    """
    lists, inputs, num_tokens, needs = given
    streams = lists.records()
    layout = _check(inputs.layout(num_tokens), streams, inputs)
    call = LinearLoss(streams, inputs, layout, needs)
    if late_gradients.formed_late(lists):
        logp_T, entropy_T, result, grads = call.late()
    elif call.rows_know_alone and any(needs):
        logp_T, entropy_T, result, grads = call.one_sweep()
    else:
        logp_T, entropy_T, result, grads = call.two_sweeps()
    flat = [grad for parts in grads for grad in parts] or [lists.hidden[0].new_empty(0) for _ in needs]
    return result.loss, logp_T, entropy_T, result.advantages, result.keep, result.metrics, flat


@fakes(OP, LinearLossInputs)
def _(given: LinearLossInputs) -> Outputs:
    lists, inputs, num_tokens, needs = given
    like = lists.hidden[0]
    wide = loss_dtype(like, inputs.backend)
    if late_gradients.formed_late(lists):
        kinds = ((num_tokens, torch.float32), (num_tokens, torch.float64), (0, torch.float64))
        grads = [like.new_empty(n, dtype=kind) for n, kind in kinds]
    else:
        grads = late_gradients.empty_gradients(lists, needs)
    return (
        like.new_empty((), dtype=wide),
        like.new_empty(num_tokens, dtype=wide),
        like.new_empty(num_tokens, dtype=wide),
        *empty_results(like, inputs),
        grads,
    )


def _save(ctx: Any, given: LinearLossInputs, output: Outputs) -> None:
    ctx.needs, ctx.late = given.needs, late_gradients.formed_late(given.streams)
    _, _, entropy, _, _, _, grads = output
    if ctx.late:
        grad_logp, lse, _ = grads
        late_gradients.save(ctx, given.streams, given.loss.backend, grad_logp, lse, entropy)
    else:
        ctx.save_for_backward(*grads)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *others: Any) -> dict[str, list[Tensor | None]]:
    refuse_second_derivative(OP)
    if grad_loss is None:
        return {}
    formed = late_gradients.gradients(ctx, grad_loss) if ctx.late else _scaled(ctx.saved_tensors, grad_loss, ctx.needs)
    grads = [grad if need else None for grad, need in zip(formed, ctx.needs, strict=True)]
    return {"hidden": grads[0::3], "weight": grads[1::3], "bias": grads[2::3]}


def _scaled(grads: Sequence[Tensor], grad_loss: Tensor, needs: Sequence[bool]) -> Iterator[Tensor]:
    return (_scale(grad, grad_loss) if need else grad for grad, need in zip(grads, needs, strict=True))


def _scale(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad · grad_loss: in place where autograd lets go of the saved gradient afterwards: dW exists only once.

    The public op hands these outputs to nobody else.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if type(grad) is not Tensor or keeps_graph() or torch._C._functorch.is_legacy_batchedtensor(grad_loss):
        return grad * grad_loss.to(grad.dtype)
    if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        return grad.detach()
    return grad.detach().mul_(grad_loss)


differentiates(OP, LinearLossInputs, _save, _differentiate)
