"""Token losses in Triton: value and derivative of one token, for vectors of tokens.

The formulas are those of `syncr1.kernels.reference.loss`; their derivatives are written out. What a caller
masks out must be finite here: put 0 into masked lanes before the call.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

ALL = tl.constexpr(tl.PropagateNan.ALL)
"""Without it a GPU's maximum and minimum pass a NaN over, and a fault of the caller becomes a number."""
MAX_LOG_RATIO = tl.constexpr(20.0)
MIN_LOG_WEIGHT = tl.constexpr(-18.420680743952367)
"""log 1e-8, the lower bound of vespo's log w."""


@triton.jit
def at_most(x, bound):
    """min, and NaN where x is."""
    return tl.minimum(x, bound, propagate_nan=ALL)


@triton.jit
def between(x, low, high):
    """x within its bounds, and NaN where x is."""
    return at_most(tl.maximum(x, low, propagate_nan=ALL), high)


@triton.jit
def log_ratio(logp, old_logp, has_old: tl.constexpr):
    """(clamped logp - old, 1 where the clamp lets the gradient through); without `old_logp` the ratio is exactly 1."""
    if has_old:
        raw = logp - old_logp
        value = between(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        passes = tl.where(tl.abs(raw) <= MAX_LOG_RATIO, 1.0, 0.0)
    else:
        value = logp * 0.0
        passes = value + 1.0
    return value, passes


@triton.jit
def clip_term(ratio, advantage, clip_low, clip_high, delta):
    """-min(min(ratio, delta) A, clip(ratio) A) and its derivative by the ratio."""
    low, high = 1.0 - clip_low, 1.0 + clip_high
    free = at_most(ratio, delta) * advantage
    clipped = between(ratio, low, high) * advantage
    free_passes = tl.where(ratio <= delta, 1.0, 0.0)
    clipped_passes = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
    # As autograd's minimum: at a tie each side gets half, so that at ratio 1 the whole gradient flows.
    both = (free_passes + clipped_passes) * 0.5
    share = tl.where(free < clipped, free_passes, tl.where(clipped < free, clipped_passes, both))
    return -at_most(free, clipped), -advantage * share


@triton.jit
def sapo_term(ratio, advantage, sapo_pos, sapo_neg):
    """-(4 / tau) sigmoid(tau (ratio - 1)) A and its derivative by the ratio."""
    tau = tl.where(advantage > 0, sapo_pos, sapo_neg)
    scaled = tau * (ratio - 1.0)
    # exp of minus a magnitude: at ratio e^20 the plain form would overflow.
    small = tl.exp(-tl.abs(scaled))
    tail = small / (1.0 + small)
    gate = tl.where(scaled >= 0, 1.0 / (1.0 + small), tail)
    slope = small / ((1.0 + small) * (1.0 + small))
    return -4.0 / tau * gate * advantage, -4.0 * advantage * slope


@triton.jit
def policy_term(logp, ratio, advantage, LOSS: tl.constexpr, clip_low, clip_high, delta, sapo_pos, sapo_neg):
    """(loss, derivative by logp at a fixed ratio, derivative by the ratio); LOSS 3 is vespo before its weight."""
    if LOSS == 0:
        loss, by_ratio = clip_term(ratio, advantage, clip_low, clip_high, delta)
        by_logp = loss * 0.0
    elif LOSS == 1:
        by_logp = -at_most(ratio, clip_high) * advantage
        loss = by_logp * logp
        by_ratio = loss * 0.0
    elif LOSS == 2:
        loss, by_ratio = sapo_term(ratio, advantage, sapo_pos, sapo_neg)
        by_logp = loss * 0.0
    else:
        by_logp = -advantage
        loss = by_logp * logp
        by_ratio = loss * 0.0
    return loss, by_logp, by_ratio


@triton.jit
def kl_term(logp, ref_logp):
    """e^d - d - 1 with d = ref - logp, and its derivative by logp."""
    raw = ref_logp - logp
    difference = between(raw, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    growth = tl.exp(difference)
    return growth - difference - 1.0, tl.where(tl.abs(raw) <= MAX_LOG_RATIO, 1.0 - growth, 0.0)


@triton.jit
def vespo_weight(log_weight, advantage, k_pos, lambda_pos, k_neg, lambda_neg):
    """phi(w) = e^lambda w^k e^(-lambda w) from log w, which comes with the sequence."""
    bounded = between(log_weight, MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    k = tl.where(advantage >= 0, k_pos, k_neg)
    rate = tl.maximum(tl.where(advantage >= 0, lambda_pos, lambda_neg), 1e-4)
    return tl.exp(rate + k * bounded - rate * tl.exp(bounded))


@triton.jit
def add_kl(loss, by_logp, by_ratio, logp, ref_logp, ratio, beta, BIAS_CORRECTED: tl.constexpr):
    """The terms of policy_term with beta KL added, and the plain KL."""
    kl, kl_by_logp = kl_term(logp, ref_logp)
    if BIAS_CORRECTED:
        loss += beta * kl * ratio
        by_logp += beta * kl_by_logp * ratio
        by_ratio += beta * kl
    else:
        loss += beta * kl
        by_logp += beta * kl_by_logp
    return loss, by_logp, by_ratio, kl


@triton.jit
def token_gradient(
    logp,
    old_logp,
    has_old: tl.constexpr,
    ref_logp,
    has_ref: tl.constexpr,
    advantage,
    is_ratio,
    weight,
    LOSS: tl.constexpr,
    clip_low,
    clip_high,
    delta,
    beta,
    BIAS_CORRECTED: tl.constexpr,
    sapo_pos,
    sapo_neg,
):
    """(weight * loss, weight * d loss / d logp) with a ratio per token.

    LOSS is 0 clip, 1 cispo, 2 sapo; `delta` is inf for none; `is_ratio` is 1 for none. `old_logp` is not read without
    has_old, `ref_logp` and `beta` not without has_ref. The derivative goes through one ratio, so everything that
    depends on it is collected before the chain rule.
    """
    value, passes = log_ratio(logp, old_logp, has_old)
    ratio = tl.exp(value)
    loss, by_logp, by_ratio = policy_term(logp, ratio, advantage, LOSS, clip_low, clip_high, delta, sapo_pos, sapo_neg)
    loss, by_logp, by_ratio = loss * is_ratio, by_logp * is_ratio, by_ratio * is_ratio
    if has_ref:
        loss, by_logp, by_ratio, _ = add_kl(loss, by_logp, by_ratio, logp, ref_logp, ratio, beta, BIAS_CORRECTED)
    return weight * loss, weight * (by_logp + by_ratio * ratio * passes)
