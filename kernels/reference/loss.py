"""GRPO and its relatives on the packed layout.

    ℓ_t = clamp(logp_t − old_t, ±20),   ρ_t = exp ℓ_t   or, per sequence, exp(mean ℓ) or exp clamp(Σℓ, ±20)
    grpo, bnpo, dr_grpo, dapo, luspo:   −min(min(ρ, δ) A, clip(ρ, 1−ε_low, 1+ε_high) A)
    cispo:   −min(ρ, ε_high).detach() A logp          sapo:   −(4/τ) σ(τ (ρ − 1)) A
    vespo:   −φ A logp,   φ = e^λ w^k e^(−λw),   w = exp Σℓ
    plus β (e^d − d − 1) with d = ref − logp

Formulas, reductions and defaults are TRL's (`GRPOTrainer._compute_loss`); luspo reduces to mean_i Σ_t.

Dims: `T` packed tokens, `S` sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_allowed, check_log_probabilities
from ..layout import PackedLayout
from ..outputs import GRPOOutput
from ..plan import (
    Scores,
    acting_tokens,
    by_modality,
    policy_mask,
    score_rewards,
    token_advantages,
    without_pruned,
)
from ..streams import TokenStream
from ..terms import LossInputs
from .advantage import standardize
from .logp import accumulator, linear_logp
from .reduction import PackedTerms, entropy_quantile_mask, loss_metrics, per_token, reduce_loss
from .segments import sum_segments
from .select import dgs_select

OP = "linear_grpo_loss"
MAX_LOG_RATIO = 20.0
"""Bound of |log-ratio| and |log w|: beyond it a ratio says only that the sample is useless."""
MIN_LOG_WEIGHT = math.log(1e-8)
"""Lower bound of vespo's log w, as in TRL."""


class _Groups:
    """The group statistics of this backend."""

    group_advantages = staticmethod(standardize)
    dgs_select = staticmethod(dgs_select)


def grpo_loss(logp: Tensor, inputs: LossInputs) -> GRPOOutput:
    """See `syncr1.kernels.api.grpo_loss`."""
    layout, scores = inputs.layout(logp.shape[0]), score_rewards(_Groups(), inputs)
    mask_T = policy_mask(layout, scores)
    terms = PackedTerms(layout, mask_T, mask_T, logp.dtype, inputs.options, inputs.num_items)
    return packed_loss(logp, inputs, inputs.entropy, terms, scores)


def linear_grpo_loss(streams: Sequence[TokenStream], inputs: LossInputs, layout: PackedLayout) -> GRPOOutput:
    """See `syncr1.kernels.api.linear_grpo_loss`; the layout's mask and modality are those of the streams."""
    scores = score_rewards(_Groups(), inputs)
    counted_T = policy_mask(layout, scores)
    image_T, sequence_T = layout.image_tokens, layout.sequence_of_token
    mask_T = acting_tokens(inputs.options, scores, counted_T, sequence_T, image_T)
    check_allowed(OP, streams, mask_T)
    logp_T, entropy_T = _score_streams(streams, mask_T)
    check_log_probabilities(OP, mask_T, layout.num_tokens, logp=logp_T)
    kept = scores.keep[sequence_T].nonzero().squeeze(1)
    if kept.shape[0] == layout.num_tokens:
        terms = PackedTerms(layout, mask_T, counted_T, logp_T.dtype, inputs.options, inputs.num_items)
        return packed_loss(logp_T, inputs, entropy_T, terms, scores)
    inputs, layout = without_pruned(inputs, layout, scores.keep, kept)
    terms = PackedTerms(layout, mask_T[kept], counted_T[kept], logp_T.dtype, inputs.options, inputs.num_items)
    output = packed_loss(logp_T[kept], inputs, entropy_T[kept], terms, scores)
    return replace(output, logp=logp_T.detach(), entropy=entropy_T)


def _score_streams(streams: Sequence[TokenStream], mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (with gradient) and entropy (without) of the tokens in `mask_T`, 0 elsewhere: [T] each."""
    dtype = accumulator(streams[0].hidden.dtype)
    logp_T = torch.zeros(mask_T.shape[0], dtype=dtype, device=mask_T.device)
    entropy_T = torch.zeros_like(logp_T)
    for stream in streams:
        hidden, targets, rows, support = stream.hidden, stream.targets, stream.rows.long(), stream.support
        used = mask_T[rows]
        if not bool(used.all()):
            hidden, targets, rows = hidden[used], targets[used], rows[used]
            support = None if support is None else support[used]
        logp_N, entropy_N = linear_logp(
            hidden,
            stream.weight,
            targets,
            bias=stream.bias,
            temperature=stream.temperature,
            forbidden=stream.forbidden,
            support=support,
        )
        logp_T = logp_T.index_copy(0, rows, logp_N.to(dtype))
        entropy_T = entropy_T.index_copy(0, rows, entropy_N.detach().to(dtype))
    return logp_T, entropy_T


def packed_loss(
    logp: Tensor, inputs: LossInputs, entropy: Tensor | None, terms: PackedTerms, scores: Scores
) -> GRPOOutput:
    """The loss of per-token log-probabilities: masks first, then ratios, token losses, reduction, metrics."""
    settings, old_logp, ref_logp, is_ratio = terms.settings, inputs.old_logp, inputs.ref_logp, inputs.is_ratio
    logp_T = terms.masked(logp)
    log_ratio_T = (logp_T - terms.masked(logp if old_logp is None else old_logp).detach()).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    ratio_T = _importance_ratio(log_ratio_T, terms).exp()
    sampler_T = None if is_ratio is None else _per_token_is_ratio(is_ratio, terms)
    advantage_T = token_advantages(scores, terms.sequence_T, terms.image_T).to(terms.dtype)
    loss_T = _policy_term(ratio_T, logp_T, log_ratio_T, advantage_T, sampler_T, is_ratio, terms)
    if settings.top_entropy_quantile < 1:
        loss_T = loss_T * entropy_quantile_mask(entropy, terms)
    if sampler_T is not None and settings.loss_type != "vespo":
        loss_T = loss_T * sampler_T
    kl_T = None
    if ref_logp is not None:
        difference_T = (terms.masked(ref_logp).detach() - logp_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_T = difference_T.exp() - difference_T - 1
        corrected_T = kl_T * ratio_T if settings.bias_corrected_kl else kl_T
        loss_T = loss_T + per_token(settings.beta, terms) * corrected_T
    loss = reduce_loss(loss_T * per_token(settings.weight, terms), terms)
    metrics = loss_metrics(terms, ratio_T.detach(), advantage_T, kl_T, entropy, scores)
    entropy_T = None if entropy is None else entropy.detach()
    return GRPOOutput(loss, by_modality(scores.advantages), scores.keep, metrics, logp.detach(), entropy_T)


def _importance_ratio(log_ratio_T: Tensor, terms: PackedTerms) -> Tensor:
    """[T] log-ratio per token, or its mean or bounded sum over the sequence's loss tokens."""
    if terms.settings.ratio == "token":
        return log_ratio_T
    total_S = sum_segments(log_ratio_T, terms.layout.cu_seqlens)
    if terms.settings.ratio == "product":
        return total_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[terms.sequence_T]
    return (total_S / terms.count_S.clamp_min(1))[terms.sequence_T]


def _per_token_is_ratio(is_ratio: Tensor, terms: PackedTerms) -> Tensor:
    """[T], [S] or [S, 1] correction for the sampler's policy → [T]. Where T == S, [S, 1] tells the two apart."""
    if is_ratio.shape == (terms.layout.num_tokens,):
        return terms.masked(is_ratio.detach(), fill=1.0)
    return terms.masked(is_ratio.detach().reshape(-1)[terms.sequence_T], fill=1.0)


def _policy_term(
    ratio_T: Tensor,
    logp_T: Tensor,
    log_ratio_T: Tensor,
    advantage_T: Tensor,
    sampler_T: Tensor | None,
    is_ratio: Tensor | None,
    terms: PackedTerms,
) -> Tensor:
    """[T] token loss before the sampler's correction and the KL."""
    settings = terms.settings
    if settings.loss_type == "cispo":
        bounded_T = torch.minimum(ratio_T, per_token(settings.clip_high, terms)).detach()
        return -bounded_T * advantage_T * logp_T
    if settings.loss_type == "sapo":
        positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
        tau_T = torch.where(advantage_T > 0, positive, negative).to(terms.dtype)
        return -torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T * advantage_T
    if settings.loss_type == "vespo":
        per_sequence = is_ratio is not None and is_ratio.shape != (terms.layout.num_tokens,)
        return -_vespo_weight(log_ratio_T, advantage_T, sampler_T, per_sequence, terms) * advantage_T * logp_T
    low, high = 1 - per_token(settings.clip_low, terms), 1 + per_token(settings.clip_high, terms)
    # clamp, not minimum: at a bound clamp passes the whole gradient, and at ratio 1 min's two halves add up to one.
    clipped_T = torch.clamp(ratio_T, low, high)
    if settings.delta is not None:
        ratio_T = torch.clamp(ratio_T, max=per_token(settings.delta, terms))
    return -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)


def _vespo_weight(
    log_ratio_T: Tensor, advantage_T: Tensor, sampler_T: Tensor | None, per_sequence: bool, terms: PackedTerms
) -> Tensor:
    """[T] detached φ(w), w = exp Σℓ of the sequence; the sampler's correction goes into w, not beside it."""
    settings, offsets = terms.settings, terms.layout.cu_seqlens
    log_w_S = sum_segments(log_ratio_T.detach(), offsets)
    if sampler_T is not None:
        log_sampler_S = sum_segments(sampler_T.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO) * terms.mask_T, offsets)
        log_w_S = log_w_S + (log_sampler_S / terms.count_S.clamp_min(1) if per_sequence else log_sampler_S)
    log_w_T = log_w_S.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)[terms.sequence_T]
    positive_T = advantage_T >= 0
    k_T = torch.where(positive_T, settings.vespo_k_pos, settings.vespo_k_neg)
    lambda_T = torch.where(positive_T, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp_min(1e-4)
    return (lambda_T + k_T * log_w_T - lambda_T * log_w_T.exp()).exp()
