"""`grpo_loss`: loss and d loss / d logp in one pass; backward only scales.

Backends `native` and `triton`; `reference` is ordinary autograd, called directly as the differentiable PyTorch code
that it is, but for meta tensors, which have no values to select rows by.

Dims: `T` packed tokens, `S` sequences, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_float, refuse
from ..dispatch import choose, module_of, same_device
from ..layout import PackedLayout
from ..options import LossOptions
from ..outputs import GRPOOutput
from ..plan import Rewards, Scores, by_modality, entropy_thresholds, policy_mask, score_rewards
from ..reference import loss as reference
from ..reference.advantage import combine_rewards
from ..register import LIBRARY, fakes, flatten, gatherer, implements, registered
from ..terms import METRICS, LossInputs, LossTerms, TokenLoss
from .logp import refuse_second_derivative
from .loss_inputs import check_loss_inputs, encode_options, lists_options, loss_inputs, named_metrics

OP = "grpo_loss"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class TokenLossInputs(NamedTuple):
    """Arguments of the registered op."""

    logp: Tensor
    """[T]."""
    loss: LossInputs


@lists_options
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None = None,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> GRPOOutput:
    """GRPO-family loss of packed sequences, from per-token log-probabilities.

    Equivalent PyTorch, for the defaults without pruning:
        A = group_advantages(rewards, group_offsets)[sequence_of_token]
        ratio = (logp - old_logp).clamp(-20, 20).exp()
        token_loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        loss = token_loss[loss_mask].sum() / loss_mask.sum()

    Args:
        logp: [T] float, nats; of the target tokens, with gradient. Values outside the loss mask may be anything.
        old_logp: [T] float, nats, of the policy that the ratio is taken against; None = `logp.detach()` (on policy).
        rewards: [S] or [S, K] float, NaN = none; or {"text": …, "image": …}: each token takes the advantage computed
            from the rewards of its own modality. None where `advantages` are given.
        cu_seqlens: [S+1] int; a pruned sequence stays in it with zero tokens, so statistics cover the whole group.
        group_offsets: [P+1] int.
        advantages: [S] float, or one [S] per modality: your own in place of rewards; `dgs` ranks by them.
        loss_mask: [T] bool, tokens the policy produced; None = all.
        modality: [T] uint8, 0 text, 1 image; None = all text (and metrics for text alone).
        ref_logp: [T] float, nats, of the reference policy.
        is_ratio: [S], [S, 1] or [T] float > 0; π_old/π_sampler, multiplied onto the policy term. Where T == S, [S] is
            read as [T]: pass [S, 1].
        entropy: [T] float, nats; for the metrics and `top_entropy_quantile`.
        weights: [K] float; reward weights.
        backend: see `syncr1.kernels.dispatch`.
        **options: fields of `LossOptions`.

    Returns:
        GRPOOutput; without any loss token the loss is 0 and every gradient finite and 0.

    Raises:
        ValueError: a shape, dtype or value is out of place, an option is unknown, or a log-probability that carries
            loss is not finite (NonFiniteError).

    Source: TRL's `GRPOTrainer` (formulas and defaults); luspo as in TRL issue 6654.
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
        "entropy": entropy,
        "weights": weights,
    }
    same_device(OP, logp=logp, **given, num_items=options.get("num_items"))
    settings, num_items = encode_options(OP, options)
    check_float(OP, "logp", logp)
    if logp.dim() != 1:
        refuse(OP, "logp", "[T]", list(logp.shape), "pack the sequences onto one axis: logp[mask]")
    inputs = loss_inputs(OP, given, settings, num_items, choose(OP, backend, logp, old_logp, ref_logp))
    if inputs.backend == "reference" and not logp.is_meta:
        check_loss_inputs(OP, inputs, inputs.layout(logp.shape[0]), logp)
        return reference.grpo_loss(logp, inputs)
    loss, _, advantages_MS, keep, values = _run(TokenLossInputs(logp, inputs))
    metrics = named_metrics(
        values.detach(), image=modality is not None, kl=ref_logp is not None, entropy=entropy is not None
    )
    credit = by_modality(advantages_MS.detach())
    return GRPOOutput(loss, credit, keep, metrics, logp.detach(), None if entropy is None else entropy.detach())


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


@implements(OP, TokenLossInputs, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
def form_loss(given: TokenLossInputs) -> Outputs:
    """(loss, grad_logp [T], advantages [M, S], keep [S], metrics [18])."""
    logp, inputs = given
    options, module, layout = inputs.options, module_of(inputs.backend), inputs.layout(logp.shape[0])
    check_loss_inputs(OP, inputs, layout, logp, finite=not module.FINDS_NONFINITE)
    rewards = scores = thresholds = None
    if fusable(options, inputs.rewards):
        rewards = torch.stack([combine_rewards(part.detach(), inputs.weights) for part in inputs.rewards])
    else:
        scores = score_rewards(module, inputs)
        if options.top_entropy_quantile < 1:
            assert inputs.entropy is not None  # checked
            entropy_T = inputs.entropy.detach().float()
            thresholds = entropy_thresholds(options, entropy_T, policy_mask(layout, scores), layout.image_tokens)
    result = token_loss(module, logp, inputs, options, layout, rewards=rewards, scores=scores, thresholds=thresholds)
    if not result.finite:
        check_loss_inputs(OP, inputs, layout, logp)
    return result.loss, result.grad_logp, result.advantages, result.keep, result.metrics


def token_loss(
    module: Any,
    logp: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    layout: PackedLayout,
    *,
    rewards: Tensor | None = None,
    scores: Scores | None = None,
    thresholds: Tensor | None = None,
) -> TokenLoss:
    """The backend's loss of validated tensors, in the form that it takes; options and layout are those that hold."""
    modality = layout.modality
    terms = LossTerms(
        settings=options,
        cu_seqlens=layout.cu_seqlens.long().contiguous(),
        group_offsets=layout.group_offsets.long().contiguous(),
        logp=logp.detach().float().contiguous(),
        old_logp=plain(inputs.old_logp),
        ref_logp=plain(inputs.ref_logp),
        entropy=plain(inputs.entropy),
        loss_mask=None if layout.loss_mask is None else layout.loss_mask.contiguous(),
        modality=None if modality is None else modality.to(torch.uint8).contiguous(),
        is_ratio=plain(inputs.is_ratio),
        is_per_sequence=is_per_sequence(inputs.is_ratio, layout.num_tokens),
        rewards=rewards,
        advantages=None if scores is None else scores.advantages.float().contiguous(),
        keep=None if scores is None else scores.keep.contiguous(),
        frac_reward_zero_std=None if scores is None else scores.frac_reward_zero_std.float(),
        entropy_thresholds=None if thresholds is None else thresholds.float(),
        num_items=plain(inputs.num_items),
    )
    result: TokenLoss = module.token_loss(terms)
    return result


def loss_dtype(like: Tensor, backend: str) -> torch.dtype:
    """Of a loss and of log-probabilities; `reference` gets here with meta tensors alone."""
    return torch.float64 if backend == "reference" and like.dtype == torch.float64 else torch.float32


@fakes(OP, TokenLossInputs)
def _(given: TokenLossInputs) -> Outputs:
    logp, inputs = given
    return (
        logp.new_empty((), dtype=loss_dtype(logp, inputs.backend)),
        logp.new_empty(logp.shape, dtype=loss_dtype(logp, inputs.backend)),
        *empty_results(logp, inputs),
    )


def empty_results(like: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of advantages [M, S], keep [S] and metrics [18]."""
    num_sequences, num_credits = inputs.cu_seqlens.shape[0] - 1, len(inputs.rewards) or len(inputs.advantages)
    return (
        like.new_empty((num_credits, num_sequences), dtype=torch.float32),
        like.new_empty(num_sequences, dtype=torch.bool),
        like.new_empty(len(METRICS), dtype=torch.float32),
    )


class _Differentiable(torch.autograd.Function):
    """Autograd by hand: what `torch.library.register_autograd` adds for any schema costs more than the loss does."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, given: TokenLossInputs, call: Callable[[TokenLossInputs], Outputs]) -> Outputs:
        outputs = call(given)
        ctx.save_for_backward(outputs[1])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.dtype = logp.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(OP)
        (grad_logp_T,) = ctx.saved_tensors
        return None if grad_loss is None else (grad_logp_T * grad_loss).to(ctx.dtype), None, None


def _differentiable(given: TokenLossInputs, call: Callable[[TokenLossInputs], Outputs]) -> Outputs:
    if given.logp.requires_grad and torch.is_grad_enabled():
        outputs: Outputs = _Differentiable.apply(given.logp, given, call)
        return outputs
    return call(given)


def _below_autograd(given: TokenLossInputs) -> Outputs:
    with torch._C._AutoDispatchBelowAutograd():
        outputs: Outputs = registered.grpo_loss(*flatten(given))
    return outputs


LIBRARY.impl(OP, lambda *flat: _differentiable(gatherer(TokenLossInputs)(flat), _below_autograd), "Autograd")


def _run(given: TokenLossInputs) -> Outputs:
    """`torch.ops.syncr1.grpo_loss`, past torch's dispatcher where nobody could tell: that costs as much as the loss."""
    logp = given.logp
    traced = torch.compiler.is_compiling() or type(logp) is not Tensor or logp.is_meta
    if traced or torch._C._len_torch_dispatch_stack() > 0:
        outputs: Outputs = registered.grpo_loss(*flatten(given))
        return outputs
    return _differentiable(given, form_loss)
