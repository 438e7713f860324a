"""GRPO and its relatives on the packed layout.

    ℓ_t = clamp(logp_t − old_t, ±20),   ρ_t = exp ℓ_t   or, per sequence, exp(mean ℓ)
    grpo, bnpo, dr_grpo, dapo, luspo:   −min(min(ρ, δ) A, clip(ρ, 1−ε_low, 1+ε_high) A)
    cispo:   −min(ρ, ε_high).detach() A logp          sapo:   −(4/τ) σ(τ (ρ − 1)) A
    vespo:   −φ A logp,   φ = e^λ w^k e^(−λw),   w = exp Σℓ
    plus β (e^d − d − 1) with d = ref − logp

Formulas, reductions and defaults are TRL's (`GRPOTrainer._compute_loss`); luspo reduces to mean_i Σ_t.

Dims: `T` packed tokens, `S` sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from syncr1.kernels.layout import PackedLayout, check_float, check_streams, check_vector, refuse
from syncr1.kernels.options import LossOptions
from syncr1.kernels.records import MODALITIES, GRPOOutput, TokenStream
from syncr1.kernels.reference.logp import accumulator, linear_logp
from syncr1.kernels.reference.reduction import PackedTerms, entropy_quantile_mask, loss_metrics, per_token, reduce_loss
from syncr1.kernels.reference.scores import Scores, score_rewards
from syncr1.kernels.reference.segments import sum_segments

MAX_LOG_RATIO = 20.0
"""Bound of |log-ratio| and |log w|: beyond it a ratio says only that the sample is useless."""
MIN_LOG_WEIGHT = math.log(1e-8)
"""Lower bound of vespo's log w, as in TRL."""


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Tensor | Mapping[str, Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> GRPOOutput:
    """See `syncr1.kernels.api.grpo_loss`."""
    op = "grpo_loss"
    settings = LossOptions.parse(op, options)
    layout = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask)
    layout.validate(op)
    check_float(op, "logp", logp)
    scores = score_rewards(op, rewards, layout, settings, weights)
    mask_T = policy_mask(layout, scores.keep)
    return packed_loss(op, logp, old_logp, ref_logp, is_ratio, entropy, mask_T, layout, scores, settings)


def linear_grpo_loss(
    streams: Sequence[TokenStream],
    rewards: Tensor | Mapping[str, Tensor],
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    old_logp: Tensor | None = None,
    loss_mask: Tensor | None = None,
    modality: Tensor | None = None,
    ref_logp: Tensor | None = None,
    is_ratio: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> GRPOOutput:
    """See `syncr1.kernels.api.linear_grpo_loss`."""
    op = "linear_grpo_loss"
    settings = LossOptions.parse(op, options)
    plain = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask)
    plain.validate(op)
    check_streams(op, streams, plain.num_tokens)
    covered_T, modality_T = stream_coverage(op, streams, plain)
    layout = PackedLayout(cu_seqlens, group_offsets, modality_T, covered_T)
    scores = score_rewards(op, rewards, layout, settings, weights)
    mask_T = policy_mask(layout, scores.keep)
    logp_T, entropy_T = score_streams(op, streams, mask_T)
    return packed_loss(op, logp_T, old_logp, ref_logp, is_ratio, entropy_T, mask_T, layout, scores, settings)


def policy_mask(layout: PackedLayout, keep_S: Tensor) -> Tensor:
    """[T] bool: tokens that carry loss."""
    kept_T = keep_S[layout.sequence_of_token]
    return kept_T if layout.loss_mask is None else kept_T & layout.loss_mask


def stream_coverage(op: str, streams: Sequence[TokenStream], layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Tokens that some stream scores (and loss_mask admits), and their modality: [T] bool, [T] uint8."""
    device = layout.cu_seqlens.device if layout.loss_mask is None else layout.loss_mask.device
    covered_T = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    modality_T = torch.zeros(layout.num_tokens, dtype=torch.uint8, device=device)
    for stream in streams:
        covered_T[stream.rows] = True
        modality_T[stream.rows] = MODALITIES.index(stream.modality)
    if layout.modality is not None and bool((layout.modality != modality_T)[covered_T].any()):
        refuse(op, "modality", "that of the streams", "another one at some rows", "leave it out: streams carry it")
    return covered_T if layout.loss_mask is None else covered_T & layout.loss_mask, modality_T


def score_streams(op: str, streams: Sequence[TokenStream], mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (with gradient) and entropy (without) of the tokens in `mask_T`, 0 elsewhere: [T] each."""
    dtype = accumulator(streams[0].hidden.dtype)
    logp_T = torch.zeros(mask_T.shape[0], dtype=dtype, device=mask_T.device)
    entropy_T = torch.zeros_like(logp_T)
    for stream in streams:
        hidden, targets, rows = stream.hidden, stream.targets, stream.rows.long()
        used = mask_T[rows]
        if not bool(used.all()):
            hidden, targets, rows = hidden[used], targets[used], rows[used]
        if stream.forbidden is not None and bool(torch.isin(targets, stream.forbidden).any()):
            refuse(
                op, "targets", "outside `forbidden`", "a forbidden id among them", "take that token out of loss_mask"
            )
        logp_N, entropy_N = linear_logp(
            hidden,
            stream.weight,
            targets,
            bias=stream.bias,
            temperature=stream.temperature,
            forbidden=stream.forbidden,
        )
        logp_T = logp_T.index_copy(0, rows, logp_N.to(dtype))
        entropy_T = entropy_T.index_copy(0, rows, entropy_N.detach().to(dtype))
    return logp_T, entropy_T


def packed_loss(
    op: str,
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    entropy: Tensor | None,
    mask_T: Tensor,
    layout: PackedLayout,
    scores: Scores,
    settings: LossOptions,
) -> GRPOOutput:
    """The loss of per-token log-probabilities: masks first, then ratios, token losses, reduction, metrics."""
    remedy = "did packing drop a first token?"
    named = {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp, "entropy": entropy}
    for name, tensor in named.items():
        if tensor is not None:
            check_vector(op, name, tensor, layout.num_tokens, remedy)
    if ref_logp is None and any(settings_beta != 0 for settings_beta in _values(settings.beta)):
        refuse(op, "ref_logp", "given where beta is not 0", None, "pass the reference policy's log-probabilities")
    terms = PackedTerms(layout, mask_T, logp.dtype, settings)
    logp_T = terms.masked(logp)
    log_ratio_T = (logp_T - terms.masked(logp if old_logp is None else old_logp).detach()).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    ratio_T = _importance_ratio(log_ratio_T, terms).exp()
    sampler_T = None if is_ratio is None else _per_token_is_ratio(op, is_ratio, terms)
    advantage_T = scores.per_token(terms).to(terms.dtype)
    loss_T = _policy_term(ratio_T, logp_T, log_ratio_T, advantage_T, sampler_T, is_ratio, terms)
    if settings.top_entropy_quantile < 1:
        loss_T = loss_T * entropy_quantile_mask(op, entropy, terms)
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
    return GRPOOutput(loss, scores.advantages, scores.keep, metrics, logp.detach(), entropy_T)


def _values(value: float | Mapping[str, float]) -> list[float]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _importance_ratio(log_ratio_T: Tensor, terms: PackedTerms) -> Tensor:
    """[T] log-ratio per token, or its mean over the sequence's loss tokens: the geometric mean, never the product."""
    if terms.settings.ratio == "token":
        return log_ratio_T
    total_S = sum_segments(log_ratio_T, terms.layout.cu_seqlens)
    return (total_S / terms.count_S.clamp_min(1))[terms.sequence_T]


def _per_token_is_ratio(op: str, is_ratio: Tensor, terms: PackedTerms) -> Tensor:
    """[T], [S] or [S, 1] correction for the sampler's policy → [T]. Where T == S, [S, 1] tells the two apart."""
    num_sequences, num_tokens = terms.layout.num_sequences, terms.layout.num_tokens
    if is_ratio.shape == (num_tokens,):
        return terms.masked(is_ratio.detach(), fill=1.0)
    if is_ratio.shape not in ((num_sequences,), (num_sequences, 1)):
        expected = f"[{num_tokens}], [{num_sequences}] or [{num_sequences}, 1]"
        refuse(op, "is_ratio", expected, list(is_ratio.shape), "one ratio per token or per sequence")
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
