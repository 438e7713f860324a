"""Terms of the GRPO loss kernels: their arguments, and what tokens and sequences contribute.

Dims: `T` packed tokens or the tokens of one tile, `S` sequences, `P` groups, `M` 1 or 2 modalities with own rewards.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..terms import ROW_LOSSES
from .token_math import (
    MAX_LOG_RATIO,
    MIN_LOG_WEIGHT,
    add_kl,
    between,
    log_ratio,
    policy_term,
    vespo_weight,
)

CISPO, VESPO = tl.constexpr(ROW_LOSSES.index("cispo")), tl.constexpr(len(ROW_LOSSES))
NUM_SUMS, NUM_EXTREMES = tl.constexpr(16), tl.constexpr(4)


class Tokens(NamedTuple):
    """Pointers; None where absent. [T], except `thresholds` [2] and `is_ratio`, which may be [S]."""

    logp: Any
    old_logp: Any
    ref_logp: Any
    entropy: Any
    loss_mask: Any
    modality: Any
    is_ratio: Any
    thresholds: Any
    num_items: Any


class Sequences(NamedTuple):
    """Pointers. `advantages` and `keep` are read without `rewards`, else written."""

    cu_seqlens: Any
    group_offsets: Any
    rewards: Any
    advantages: Any
    keep: Any


class Numbers(NamedTuple):
    """Settings, as float32 arguments: changing one compiles nothing."""

    clip_low_text: Any
    clip_low_image: Any
    clip_high_text: Any
    clip_high_image: Any
    delta_text: Any
    delta_image: Any
    beta_text: Any
    beta_image: Any
    weight_text: Any
    weight_image: Any
    sapo_pos: Any
    sapo_neg: Any
    vespo_k_pos: Any
    vespo_lambda_pos: Any
    vespo_k_neg: Any
    vespo_lambda_neg: Any
    eps_high: Any
    eps_low: Any
    mass_high: Any
    mass_low: Any
    mean_ratio: Any
    """Of SEQUENCE_RATIO: 1 the geometric mean, 0 the product."""
    factor: Any
    """1 / the divisor of the loss, as far as the host knows it: text, or both modalities."""
    factor_image: Any


class Outputs(NamedTuple):
    """Pointers to what is written."""

    grad_logp: Any
    sums: Any
    """[tiles, 16] float32: text, then image, in the order of METRICS_PER_MODALITY, with the loss after the entropy."""
    extremes: Any
    """[tiles, 4] float32: greatest ratio and minus the smallest, text, then image."""
    varies: Any
    """[P] float32, or without `rewards` the scalar frac_reward_zero_std, read."""
    loss: Any
    metrics: Any
    counts: Any
    """[2] float32: loss tokens of text and of image."""


class Form(NamedTuple):
    """What a launch is compiled for."""

    LOSS: Any
    """Index into ROW_LOSSES, or VESPO."""
    SEQUENCE_RATIO: Any
    SEQUENCE_GRADIENT: Any
    """The loss has a gradient through a ratio that the tokens of a sequence share."""
    SEQUENCE_MEAN: Any
    """grpo, sapo: tokens are averaged over their sequence."""
    SPLIT: Any
    """Modalities are reduced on their own."""
    BIAS_CORRECTED: Any
    IS_PER_SEQUENCE: Any
    M: Any
    """Rows of rewards or advantages."""
    SCALE: Any
    RULE: Any
    TILE: Any
    """Tokens per program."""


@triton.jit
def is_image(tokens, offset, inside):
    """1 at image tokens."""
    if tokens.modality is not None:
        return tl.load(tokens.modality + offset, mask=inside, other=0) != 0
    return inside & (offset < 0)


@triton.jit
def used_tokens(tokens, offset, inside):
    """1 at loss tokens among `inside`."""
    if tokens.loss_mask is not None:
        return inside & (tl.load(tokens.loss_mask + offset, mask=inside, other=0) != 0)
    return inside


@triton.jit
def masked_load(pointer, offset, used, fill):
    """Values at used tokens, `fill` elsewhere: what lies there never enters arithmetic."""
    if pointer is not None:
        return tl.load(pointer + offset, mask=used, other=fill)
    return tl.where(used, fill, fill)


@triton.jit
def token_terms(tokens, numbers, offset, used, image, advantage, is_ratio, sequence_log_ratio, log_weight, FORM):
    """(loss, derivative by logp at a fixed ratio, derivative by the ratio, ratio, gradient mask, kl, entropy).

    `sequence_log_ratio` is read for ratios per sequence, `log_weight` for vespo, `is_ratio` where it is per sequence.
    """
    LOSS: tl.constexpr = FORM.LOSS
    BIAS_CORRECTED: tl.constexpr = FORM.BIAS_CORRECTED
    logp = masked_load(tokens.logp, offset, used, 0.0)
    old_logp = masked_load(tokens.old_logp, offset, used, 0.0)
    entropy = masked_load(tokens.entropy, offset, used, 0.0)
    value, passes = log_ratio(logp, old_logp, tokens.old_logp is not None)
    if FORM.SEQUENCE_RATIO:
        value = value * 0.0 + sequence_log_ratio
    ratio = tl.exp(value)
    loss, by_logp, by_ratio = policy_term(
        logp,
        ratio,
        advantage,
        LOSS,
        tl.where(image, numbers.clip_low_image, numbers.clip_low_text),
        tl.where(image, numbers.clip_high_image, numbers.clip_high_text),
        tl.where(image, numbers.delta_image, numbers.delta_text),
        numbers.sapo_pos,
        numbers.sapo_neg,
    )
    scale = tl.where(used, 1.0, 0.0)
    if FORM.LOSS == VESPO:
        scale *= vespo_weight(
            log_weight,
            advantage,
            numbers.vespo_k_pos,
            numbers.vespo_lambda_pos,
            numbers.vespo_k_neg,
            numbers.vespo_lambda_neg,
        )
    elif tokens.is_ratio is not None:
        if FORM.IS_PER_SEQUENCE:
            scale = tl.where(used, is_ratio, 0.0)
        else:
            scale *= tl.load(tokens.is_ratio + offset, mask=used, other=0.0)
    if tokens.thresholds is not None:
        threshold = tl.where(image, tl.load(tokens.thresholds + 1), tl.load(tokens.thresholds))
        scale = tl.where(entropy >= threshold, scale, 0.0)
    loss, by_logp, by_ratio = loss * scale, by_logp * scale, by_ratio * scale
    kl = loss * 0.0
    if tokens.ref_logp is not None:
        ref_logp = masked_load(tokens.ref_logp, offset, used, 0.0)
        beta = tl.where(image, numbers.beta_image, numbers.beta_text)
        loss, by_logp, by_ratio, kl = add_kl(loss, by_logp, by_ratio, logp, ref_logp, ratio, beta, BIAS_CORRECTED)
    return loss, by_logp, by_ratio, ratio, passes, kl, entropy


@triton.jit
def token_factor(tokens, numbers, image, FORM: tl.constexpr):
    """Loss weight of the modality over the divisors that are known before the batch is counted."""
    if tokens.num_items is not None:
        factor = 1.0 / tl.maximum(tl.load(tokens.num_items), 1.0)
        factor_image = factor
        if FORM.SPLIT:
            factor_image = 1.0 / tl.maximum(tl.load(tokens.num_items + 1), 1.0)
    else:
        factor, factor_image = numbers.factor, numbers.factor_image
    return tl.where(image, numbers.weight_image * factor_image, numbers.weight_text * factor)


@triton.jit
def mean_factor(image, num_text, num_image, FORM: tl.constexpr):
    """1 / loss tokens of the sequence, of the token's modality where the two are reduced on their own."""
    count = tl.where(image, num_image, num_text) if FORM.SPLIT else num_text + num_image
    return 1.0 / tl.maximum(count, 1.0)


@triton.jit
def sum_sequence(tokens, start, end, FORM: tl.constexpr):
    """(loss tokens of text, of image, sum of log-ratios, sum of log is_ratio) of one sequence."""
    TILE: tl.constexpr = FORM.TILE
    lane = tl.arange(0, TILE)
    num_text_T = tl.zeros([TILE], tl.float32)
    num_image_T = tl.zeros([TILE], tl.float32)
    log_ratio_T = tl.zeros([TILE], tl.float32)
    log_sampler_T = tl.zeros([TILE], tl.float32)
    for first in range(start, end, TILE):
        offset = first + lane
        inside = offset < end
        used = used_tokens(tokens, offset, inside)
        image = is_image(tokens, offset, inside)
        num_text_T += tl.where(used & (image == 0), 1.0, 0.0)
        num_image_T += tl.where(used & image, 1.0, 0.0)
        if FORM.SEQUENCE_RATIO or FORM.LOSS == VESPO:
            logp = masked_load(tokens.logp, offset, used, 0.0)
            old_logp = masked_load(tokens.old_logp, offset, used, 0.0)
            value, _ = log_ratio(logp, old_logp, tokens.old_logp is not None)
            log_ratio_T += value
        if FORM.LOSS == VESPO and tokens.is_ratio is not None and not FORM.IS_PER_SEQUENCE:
            log_sampler_T += bounded_log(tl.load(tokens.is_ratio + offset, mask=used, other=1.0))
    return tl.sum(num_text_T), tl.sum(num_image_T), tl.sum(log_ratio_T), tl.sum(log_sampler_T)


@triton.jit
def join_log_ratios(numbers, log_sum, count):
    """(log of the ratio of a sequence, 1 where its bound lets the gradient through, divisor of the sum).

    A mean of bounded logarithms is bounded, their sum is not.
    """
    divisor = tl.where(numbers.mean_ratio != 0, count, 1.0)
    value = log_sum / divisor
    passes = tl.where((tl.abs(value) > MAX_LOG_RATIO) & (numbers.mean_ratio == 0), 0.0, 1.0)
    return between(value, -MAX_LOG_RATIO, MAX_LOG_RATIO), passes, divisor


@triton.jit
def bounded_log(ratio):
    """log of a sampler's ratio within vespo's bounds."""
    return between(tl.log(ratio), MIN_LOG_WEIGHT, MAX_LOG_RATIO)


@triton.jit
def sum_ratio_gradient(
    tokens,
    numbers,
    start,
    end,
    text,
    image_advantage,
    is_ratio,
    sequence_log_ratio,
    log_weight,
    num_text,
    num_image,
    FORM: tl.constexpr,
):
    """Weighted sum over one sequence of d token loss / d ratio."""
    TILE: tl.constexpr = FORM.TILE
    lane = tl.arange(0, TILE)
    sum_T = tl.zeros([TILE], tl.float32)
    for first in range(start, end, TILE):
        offset = first + lane
        inside = offset < end
        used = used_tokens(tokens, offset, inside)
        image = is_image(tokens, offset, inside)
        advantage = tl.where(image, image_advantage, text)
        _, _, by_ratio, _, _, _, _ = token_terms(
            tokens, numbers, offset, used, image, advantage, is_ratio, sequence_log_ratio, log_weight, FORM
        )
        factor = token_factor(tokens, numbers, image, FORM)
        if FORM.SEQUENCE_MEAN:
            factor *= mean_factor(image, num_text, num_image, FORM)
        sum_T += tl.where(used, by_ratio * factor, 0.0)
    return tl.sum(sum_T)
