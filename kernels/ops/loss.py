"""Registered op `syncr1::grpo_loss`: loss and d loss / d logp in one pass; backward only scales.

Backends `native` and `triton`; `reference` is ordinary autograd.

Dims: `T` packed tokens, `S` sequences, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_loss_inputs
from ..dispatch import module_of
from ..layout import PackedLayout
from ..options import LossOptions, decode
from ..plan import Scores, check_credit, entropy_thresholds, policy_mask, score_rewards
from ..reference.advantage import combine_rewards
from ..terms import METRICS, LossTerms, TokenLoss
from .logp import refuse_second_derivative
from .register import LIBRARY, fakes, implements, registered

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fusable(settings: LossOptions, rewards: Sequence[Tensor]) -> bool:
    """Advantages and the keep decision follow from each group's rewards alone, so that the loss kernel finds them."""
    by_sum = settings.aggregate == "sum_then_normalize" or all(part.dim() == 1 for part in rewards)
    by_group = settings.scale != "batch" and settings.dgs in ("none", "variance_mass", "top_k")
    return bool(rewards) and by_sum and by_group and settings.top_entropy_quantile == 1


def is_per_sequence(is_ratio: Tensor | None, num_tokens: int) -> bool:
    """Where T == S, [T] is meant; [S, 1] tells the two apart."""
    return is_ratio is not None and is_ratio.shape != (num_tokens,)


def plain(values: Tensor | None) -> Tensor | None:
    """Detached contiguous float32 [n]."""
    return None if values is None else values.detach().float().reshape(-1).contiguous()


@implements(
    "grpo_loss",
    (
        "(Tensor logp, Tensor? old_logp, Tensor[] rewards, Tensor[] advantages, Tensor cu_seqlens,"
        " Tensor group_offsets, Tensor? loss_mask, Tensor? modality, Tensor? ref_logp, Tensor? is_ratio,"
        " Tensor? entropy, Tensor? weights, Tensor? num_items, str settings, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Sequence[Tensor],
    advantages: Sequence[Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    settings: str,
    backend: str,
) -> Outputs:
    """(loss, grad_logp [T], advantages [M, S], keep [S], metrics [18])."""
    options = decode(settings)
    layout = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask, logp.shape[0])
    module = module_of(backend)
    named = {
        "logp": logp,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "entropy": entropy,
        "is_ratio": is_ratio,
        "num_items": num_items,
    }
    check_loss_inputs("grpo_loss", layout, options, named, finite=not module.FINDS_NONFINITE)
    check_credit("grpo_loss", rewards, advantages, layout, weights)
    scores = None
    if not fusable(options, rewards):
        scores = score_rewards(module, rewards, advantages, group_offsets, options, weights)
    thresholds = None
    if options.top_entropy_quantile < 1:
        assert entropy is not None and scores is not None  # checked; and not fusable
        mask_T, image_T = policy_mask(layout, scores), layout.image_tokens
        thresholds = entropy_thresholds(options, entropy.detach().float(), mask_T, image_T)
    combined = None if scores else torch.stack([combine_rewards(part.detach(), weights) for part in rewards])
    result = token_loss(
        module, layout, options, logp, old_logp=old_logp, ref_logp=ref_logp, is_ratio=is_ratio, entropy=entropy,
        rewards=combined, scores=scores, thresholds=thresholds, num_items=num_items,
    )  # fmt: skip
    if not result.finite:
        check_loss_inputs("grpo_loss", layout, options, named)
    return result.loss, result.grad_logp, result.advantages, result.keep, result.metrics


def token_loss(
    module: Any,
    layout: PackedLayout,
    options: LossOptions,
    logp: Tensor,
    *,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    entropy: Tensor | None,
    rewards: Tensor | None = None,
    scores: Scores | None = None,
    thresholds: Tensor | None = None,
    num_items: Tensor | None = None,
) -> TokenLoss:
    """The backend's loss of validated tensors, in the form that it takes."""
    modality = layout.modality
    terms = LossTerms(
        settings=options,
        cu_seqlens=layout.cu_seqlens.long().contiguous(),
        group_offsets=layout.group_offsets.long().contiguous(),
        logp=logp.detach().float().contiguous(),
        old_logp=plain(old_logp),
        ref_logp=plain(ref_logp),
        entropy=plain(entropy),
        loss_mask=None if layout.loss_mask is None else layout.loss_mask.contiguous(),
        modality=None if modality is None else modality.to(torch.uint8).contiguous(),
        is_ratio=plain(is_ratio),
        is_per_sequence=is_per_sequence(is_ratio, layout.num_tokens),
        rewards=rewards,
        advantages=None if scores is None else scores.advantages.float().contiguous(),
        keep=None if scores is None else scores.keep.contiguous(),
        frac_reward_zero_std=None if scores is None else scores.frac_reward_zero_std.float(),
        entropy_thresholds=None if thresholds is None else thresholds.float(),
        num_items=plain(num_items),
    )
    result: TokenLoss = module.token_loss(terms)
    return result


def loss_dtype(like: Tensor, backend: str) -> torch.dtype:
    """Of a loss and of log-probabilities; `reference` gets here with meta tensors alone."""
    return torch.float64 if backend == "reference" and like.dtype == torch.float64 else torch.float32


@fakes("grpo_loss")
def _(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Sequence[Tensor],
    advantages: Sequence[Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    settings: str,
    backend: str,
) -> Outputs:
    num_sequences, num_credits = cu_seqlens.shape[0] - 1, len(rewards) or len(advantages)
    return (
        logp.new_empty((), dtype=loss_dtype(logp, backend)),
        logp.new_empty(logp.shape, dtype=loss_dtype(logp, backend)),
        logp.new_empty((num_credits, num_sequences), dtype=torch.float32),
        logp.new_empty(num_sequences, dtype=torch.bool),
        logp.new_empty(len(METRICS), dtype=torch.float32),
    )


class _Differentiable(torch.autograd.Function):
    """Autograd by hand: what `torch.library.register_autograd` adds for any schema costs more than the loss does."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Outputs], logp: Tensor, *others: Any) -> Outputs:
        outputs = call(logp, *others)
        ctx.save_for_backward(outputs[1])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.num_others = logp.dtype, len(others)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("grpo_loss")
        (grad_logp_T,) = ctx.saved_tensors
        grad = None if grad_loss is None else (grad_logp_T * grad_loss).to(ctx.dtype)
        return (None, grad, *(None,) * ctx.num_others)


def _below_autograd(*arguments: Any) -> Outputs:
    with torch._C._AutoDispatchBelowAutograd():
        outputs: Outputs = registered.grpo_loss(*arguments)
    return outputs


def _with_autograd(logp: Tensor, *others: Any) -> Outputs:
    return _differentiable(_below_autograd, logp, *others)


def _differentiable(call: Callable[..., Outputs], logp: Tensor, *others: Any) -> Outputs:
    if logp.requires_grad and torch.is_grad_enabled():
        outputs: Outputs = _Differentiable.apply(call, logp, *others)
        return outputs
    return call(logp, *others)


LIBRARY.impl("grpo_loss", _with_autograd, "Autograd")


def run(logp: Tensor, *others: Any) -> Outputs:
    """`torch.ops.syncr1.grpo_loss`, past torch's dispatcher where nobody could tell: that costs as much as the loss."""
    if (
        torch.compiler.is_compiling()
        or type(logp) is not Tensor
        or logp.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        outputs: Outputs = registered.grpo_loss(logp, *others)
        return outputs
    return _differentiable(grpo_loss, logp, *others)
