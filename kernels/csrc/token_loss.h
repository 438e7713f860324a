// The token-level formulas of the GRPO family: value and derivatives of one token (kernels/reference/loss.py).
//
// Free of branches and library calls, so that a loop over any of these functions vectorises. Static: a file that is
// compiled once for each instruction set keeps its own copy, the linker must not pick one of them for all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define SYNCR1_INLINE static inline __attribute__((always_inline))

namespace syncr1 {

constexpr float kMaxLogRatio = 20.0f;

enum LossKind : int64_t { kClip, kCispo, kSapo, kVespo };  // the first three: syncr1.kernels.terms.ROW_LOSSES

// The numbers of one modality.
struct RowSettings {
  int64_t loss;
  float clip_low, clip_high, delta, beta;  // delta is INFINITY where there is none
  int32_t bias_corrected_kl;
  float sapo_pos, sapo_neg;
};

struct TokenGradient {
  float loss, grad;
};

// exp(x) = scale * (1 + r + tail), |r| <= log(2) / 2.
struct ExpParts {
  float scale, r, tail;
};

// For |x| <= 87 to about 1 ulp (Cephes expf); NaN comes out as NaN.
SYNCR1_INLINE ExpParts exp_parts(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float shifted = x * 1.44269504f + kMagic;
  const float power = shifted - kMagic;
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return {scale, r, p * (r * r)};
}

SYNCR1_INLINE float exp_bounded(float x) {
  const ExpParts e = exp_parts(x);
  return e.scale * (1.0f + (e.r + e.tail));
}

SYNCR1_INLINE float clamp(float x, float low, float high) {
  const float raised = x < low ? low : x;  // in this order NaN stays NaN
  return raised > high ? high : raised;
}

// Importance ratio of one token and its derivative with respect to logp; `raw` = logp - old.
struct Ratio {
  float value, slope;
};

SYNCR1_INLINE Ratio token_ratio(float raw) {
  const float value = exp_bounded(clamp(raw, -kMaxLogRatio, kMaxLogRatio));
  return {value, std::fabs(raw) <= kMaxLogRatio ? value : 0.0f};
}

// exp(d) - d - 1 for d = clamp(ref - logp), and its derivative with respect to logp.
struct KL {
  float value, slope;
};

SYNCR1_INLINE KL token_kl(float raw) {
  const float d = clamp(raw, -kMaxLogRatio, kMaxLogRatio);
  const ExpParts e = exp_parts(d);
  // Near 0, where scale = 1 and r = d, this is `tail` alone: no cancellation.
  const float value = e.scale * e.tail + ((e.scale * e.r - d) + (e.scale - 1.0f));
  const float expm1 = e.scale * (e.r + e.tail) + (e.scale - 1.0f);
  return {value, std::fabs(raw) <= kMaxLogRatio ? -expm1 : 0.0f};
}

// Policy term of one token: its value, d / d ratio, and d / d logp at a fixed ratio.
struct PolicyTerm {
  float loss, by_ratio, direct;
};

SYNCR1_INLINE PolicyTerm clip_term(float ratio, float advantage, float low, float high, float delta) {
  const float bounded = ratio > delta ? delta : ratio;
  const float a = bounded * advantage;
  const float b = clamp(ratio, low, high) * advantage;
  const float by_a = ratio <= delta ? 1.0f : 0.0f;
  const float by_b = (ratio >= low ? 1.0f : 0.0f) * (ratio <= high ? 1.0f : 0.0f);
  const float tie = 0.5f * (by_a + by_b);
  const float less_or_tie = a < b ? by_a : tie;
  return {-(b < a ? b : a), -advantage * (b < a ? by_b : less_or_tie), 0.0f};
}

SYNCR1_INLINE PolicyTerm cispo_term(float ratio, float advantage, float clip_high, float logp) {
  const float direct = -(ratio > clip_high ? clip_high : ratio) * advantage;
  return {direct * logp, 0.0f, direct};
}

SYNCR1_INLINE PolicyTerm sapo_term(float ratio, float advantage, float pos, float neg) {
  const float tau = advantage > 0.0f ? pos : neg;
  const float exponential = exp_bounded(clamp(-tau * (ratio - 1.0f), -87.0f, 87.0f));
  const float sigmoid = 1.0f / (1.0f + exponential);
  const float factor = -4.0f * advantage * sigmoid;
  return {factor / tau, factor * (exponential * sigmoid), 0.0f};  // 1 - sigmoid = exponential * sigmoid
}

// weight * loss and weight * d loss / d logp for ratio="token".
SYNCR1_INLINE TokenGradient token_gradient(const RowSettings& s, float logp, bool has_old, float old_logp, bool has_ref,
                                           float ref_logp, float advantage, float is_ratio, float weight) {
  const Ratio ratio = token_ratio(has_old ? logp - old_logp : 0.0f);
  PolicyTerm term;
  if (s.loss == kCispo) {
    term = cispo_term(ratio.value, advantage, s.clip_high, logp);
  } else if (s.loss == kSapo) {
    term = sapo_term(ratio.value, advantage, s.sapo_pos, s.sapo_neg);
  } else {
    term = clip_term(ratio.value, advantage, 1.0f - s.clip_low, 1.0f + s.clip_high, s.delta);
  }
  float loss = term.loss * is_ratio;
  float grad = (term.direct + term.by_ratio * ratio.slope) * is_ratio;
  if (has_ref && s.beta != 0.0f) {
    const KL kl = token_kl(ref_logp - logp);
    const bool corrected = s.bias_corrected_kl != 0;
    loss += s.beta * (corrected ? kl.value * ratio.value : kl.value);
    grad += s.beta * (corrected ? kl.slope * ratio.value + kl.value * ratio.slope : kl.slope);
  }
  return {weight * loss, weight * grad};
}

}  // namespace syncr1
