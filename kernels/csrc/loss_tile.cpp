// The loops over tokens of syncr1_token_loss, one tile at a time.
//
// A tile is taken through short loops over arrays in the first-level cache, each of which vectorises; the functions are
// compiled for several instruction sets, chosen when the library is loaded. Without contraction to FMA all give the
// same bits. What lies at a masked token is replaced by 0 when it is read and never enters arithmetic that is kept.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "loss_terms.h"

namespace syncr1 {
namespace {

constexpr int kLanes = 8;  // of a vector that every set can hold or split in two
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float))));

struct alignas(64) Tile {
  uint32_t used[kTileSize], image[kTileSize], selected[kTileSize];  // all bits set, or none
  float advantage[kTileSize], weight[kTileSize];
  float factor[kTileSize];  // of the policy term, where it has one
  float phi[kTileSize];     // vespo
  float ratio[kTileSize], slope[kTileSize];
  float loss[kTileSize], by_ratio[kTileSize], direct[kTileSize];
  float kl[kTileSize], low[kTileSize], high[kTileSize];  // low, high: 1 where that bound takes the gradient away
};

// `value` where the bits are set, else 0; unlike a conditional it lets a loop vectorise that reads `value` from memory.
SYNCR1_INLINE float masked(float value, uint32_t bits) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  word &= bits;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename Element>
SYNCR1_INLINE void fill(Element* out, int64_t begin, int64_t end, Element value) {
  for (int64_t i = begin; i < end; ++i) out[i] = value;
}

SYNCR1_INLINE void spread_bits(const uint8_t* flags, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0u - static_cast<uint32_t>(flags[i] != 0);
}

// [begin, end) of out: by modality.
template <bool kTwo>
SYNCR1_INLINE void fill_pair(const Tile& tile, float* out, int64_t begin, int64_t end, float text, float image) {
  for (int64_t i = begin; i < end; ++i) out[i] = kTwo && tile.image[i] != 0 ? image : text;
}

// Not 0 where `values` (or null) holds NaN or infinity at a used token: their exponents are all ones.
SYNCR1_INLINE uint32_t nonfinite(const float* values, int64_t first, int64_t n, const uint32_t* used) {
  if (values == nullptr) return 0;
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t word;
    std::memcpy(&word, values + first + i, sizeof word);
    found |= used[i] & (0u - static_cast<uint32_t>((word & kExponent) == kExponent));
  }
  return found;
}

SYNCR1_INLINE uint32_t inputs_nonfinite(const LossInputs& in, int64_t first, int64_t n, const uint32_t* used) {
  uint32_t found = nonfinite(in.logp, first, n, used) | nonfinite(in.old_logp, first, n, used);
  found |= nonfinite(in.ref_logp, first, n, used) | nonfinite(in.entropy, first, n, used);
  return found | nonfinite(in.is_per_sequence != 0 ? nullptr : in.is_ratio, first, n, used);
}

// used, image, and everything that a token has from its sequence. Returns whether some input is not finite.
template <bool kTwo>
SYNCR1_INLINE uint32_t gather(const LossPlan& plan, int64_t first, int64_t n, Tile& tile) {
  const LossInputs& in = plan.in;
  if (in.loss_mask == nullptr) {
    fill(tile.used, 0, n, ~uint32_t{0});
  } else {
    spread_bits(in.loss_mask + first, n, tile.used);
  }
  const uint32_t found = inputs_nonfinite(in, first, n, tile.used);
  if (kTwo) spread_bits(in.modality + first, n, tile.image);
  const int64_t* offsets = in.cu_seqlens;
  int64_t s = std::upper_bound(offsets, offsets + in.num_sequences + 1, first) - offsets - 1;
  for (int64_t begin = 0; begin < n; ++s) {
    const int64_t end = std::min(offsets[s + 1] - first, n);
    const float text = plan.advantages[0][s], image = plan.advantages[1][s];
    fill_pair<kTwo>(tile, tile.advantage, begin, end, text, image);
    fill_pair<kTwo>(tile, tile.weight, begin, end, plan.weight[0][s], plan.weight[1][s]);
    if (plan.keep[s] == 0) fill(tile.used, begin, end, uint32_t{0});
    if (plan.settings.ratio != kToken) fill(tile.ratio, begin, end, plan.ratio[s]);
    if (plan.settings.kind == kVespo) {
      fill_pair<kTwo>(tile, tile.phi, begin, end, plan.phi[text < 0.0f][s], plan.phi[image < 0.0f][s]);
    } else if (in.is_ratio != nullptr && in.is_per_sequence != 0) {
      fill(tile.factor, begin, end, in.is_ratio[s]);
    }
    begin = end;
  }
  return found;
}

SYNCR1_INLINE void ratios(const LossPlan& plan, int64_t first, int64_t n, Tile& tile) {
  if (plan.settings.ratio != kToken) return;
  const float* logp = plan.in.logp + first;
  const float* old = plan.in.old_logp == nullptr ? nullptr : plan.in.old_logp + first;
  if (old == nullptr) {
    fill(tile.ratio, 0, n, 1.0f);
    fill(tile.slope, 0, n, 1.0f);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Ratio ratio = token_ratio(masked(logp[i] - old[i], tile.used[i]));
    tile.ratio[i] = ratio.value;
    tile.slope[i] = ratio.slope;
  }
}

SYNCR1_INLINE void store(const PolicyTerm& term, int64_t i, Tile& tile) {
  tile.loss[i] = term.loss;
  tile.by_ratio[i] = term.by_ratio;
  tile.direct[i] = term.direct;
}

// Where the clip bounds take the gradient away from a ratio.
SYNCR1_INLINE void store_events(float ratio, float advantage, float low, float high, int64_t i, Tile& tile) {
  tile.low[i] = (ratio < low ? 1.0f : 0.0f) * (advantage < 0.0f ? 1.0f : 0.0f);
  tile.high[i] = (ratio > high ? 1.0f : 0.0f) * (advantage > 0.0f ? 1.0f : 0.0f);
}

template <bool kTwo>
SYNCR1_INLINE void policy_terms(const LossPlan& plan, int64_t first, int64_t n, Tile& tile) {
  const RowSettings text = plan.row[0], image = plan.row[1];
  const float* logp = plan.in.logp + first;
  if (plan.settings.kind == kCispo) {
    for (int64_t i = 0; i < n; ++i) {
      const float high = kTwo && tile.image[i] != 0 ? image.clip_high : text.clip_high;
      store(cispo_term(tile.ratio[i], tile.advantage[i], high, masked(logp[i], tile.used[i])), i, tile);
      store_events(tile.ratio[i], tile.advantage[i], 0.0f, high, i, tile);  // no ratio is below 0
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool is_image = kTwo && tile.image[i] != 0;
    const float low = 1.0f - (is_image ? image.clip_low : text.clip_low);
    const float high = 1.0f + (is_image ? image.clip_high : text.clip_high);
    const float delta = is_image ? image.delta : text.delta;
    store(clip_term(tile.ratio[i], tile.advantage[i], low, high, delta), i, tile);
    store_events(tile.ratio[i], tile.advantage[i], low, high, i, tile);
  }
  if (plan.settings.kind == kSapo) {
    for (int64_t i = 0; i < n; ++i) {
      store(sapo_term(tile.ratio[i], tile.advantage[i], text.sapo_pos, text.sapo_neg), i, tile);
    }
  } else if (plan.settings.kind == kVespo) {
    for (int64_t i = 0; i < n; ++i) {
      const float direct = -tile.phi[i] * tile.advantage[i];
      store(PolicyTerm{direct * masked(logp[i], tile.used[i]), 0.0f, direct}, i, tile);
    }
  }
}

// The sampler's correction and the entropy threshold act on the policy term.
SYNCR1_INLINE void apply_factor(const LossPlan& plan, int64_t first, int64_t n, Tile& tile) {
  const LossInputs& in = plan.in;
  const bool sampler = in.is_ratio != nullptr && plan.settings.kind != kVespo;
  if (!sampler && in.entropy_thresholds == nullptr) return;
  if (!sampler) {
    fill(tile.factor, 0, n, 1.0f);
  } else if (in.is_per_sequence == 0) {
    std::memcpy(tile.factor, in.is_ratio + first, static_cast<size_t>(n) * sizeof(float));
  }
  if (in.entropy_thresholds != nullptr) {
    const float text = in.entropy_thresholds[0], image = in.entropy_thresholds[1];
    const float* entropy = in.entropy + first;
    for (int64_t i = 0; i < n; ++i) {
      const float threshold = in.modality != nullptr && tile.image[i] != 0 ? image : text;
      tile.factor[i] = masked(tile.factor[i], 0u - static_cast<uint32_t>(entropy[i] >= threshold));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    tile.loss[i] *= tile.factor[i];
    tile.by_ratio[i] *= tile.factor[i];
    tile.direct[i] *= tile.factor[i];
  }
}

template <bool kTwo>
SYNCR1_INLINE void kl_terms(const LossPlan& plan, int64_t first, int64_t n, Tile& tile) {
  if (plan.in.ref_logp == nullptr) return;
  const float *ref = plan.in.ref_logp + first, *logp = plan.in.logp + first;
  const float text = plan.row[0].beta, image = plan.row[1].beta;
  const bool corrected = plan.settings.bias_corrected_kl != 0;
  for (int64_t i = 0; i < n; ++i) {
    const KL kl = token_kl(masked(ref[i] - logp[i], tile.used[i]));
    const float beta = kTwo && tile.image[i] != 0 ? image : text;
    const float factor = corrected ? beta * tile.ratio[i] : beta;
    tile.kl[i] = kl.value;
    tile.loss[i] += factor * kl.value;
    tile.direct[i] += factor * kl.slope;
    tile.by_ratio[i] += corrected ? beta * kl.value : 0.0f;
  }
}

SYNCR1_INLINE void finish(const LossPlan& plan, int64_t n, float* grad, float* by_ratio, Tile& tile) {
  if (plan.settings.ratio == kToken) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = tile.direct[i] + tile.by_ratio[i] * tile.slope[i];
      grad[i] = masked(tile.weight[i] * value, tile.used[i]);
      tile.loss[i] *= tile.weight[i];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = masked(tile.weight[i] * tile.direct[i], tile.used[i]);
    by_ratio[i] = masked(tile.weight[i] * tile.by_ratio[i], tile.used[i]);
    tile.loss[i] *= tile.weight[i];
  }
}

SYNCR1_INLINE void add_selected(Floats& lanes, const float* values, const uint32_t* bits) {
  Words words, selected;
  std::memcpy(&words, values, sizeof words);
  std::memcpy(&selected, bits, sizeof selected);
  lanes += (Floats)(words & selected);
}

// Sum over the tokens whose bits are set. A lane adds the few floats of a tile, the lanes are added in double.
SYNCR1_INLINE double sum_selected(const float* values, const uint32_t* bits, int64_t n) {
  Floats even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    add_selected(even, values + i, bits + i);
    add_selected(odd, values + i + kLanes, bits + i + kLanes);
  }
  double total = 0.0;
  for (; i < n; ++i) total += static_cast<double>(masked(values[i], bits[i]));
  double parts[4];
  for (int k = 0; k < 4; ++k) {
    parts[k] = (static_cast<double>(even[k]) + static_cast<double>(even[k + 4])) +
               (static_cast<double>(odd[k]) + static_cast<double>(odd[k + 4]));
  }
  return total + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Greatest and smallest of the ratios whose bits are set: they are positive, and so order as their bits do.
SYNCR1_INLINE void extremes_selected(const float* ratios, const uint32_t* bits, int64_t n, ModalitySums& out) {
  constexpr int32_t kInfinity = 0x7f800000;
  int32_t greatest = 0, smallest = kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t selected = static_cast<int32_t>(bits[i]);
    int32_t word;
    std::memcpy(&word, ratios + i, sizeof word);
    const int32_t below = (word & selected) | (kInfinity & ~selected);
    greatest = (word & selected) > greatest ? (word & selected) : greatest;
    smallest = below < smallest ? below : smallest;
  }
  std::memcpy(&out.ratio_max, &greatest, sizeof out.ratio_max);
  std::memcpy(&out.ratio_min, &smallest, sizeof out.ratio_min);
}

SYNCR1_INLINE void modality_sums(const LossPlan& plan, int64_t first, const uint32_t* bits, int64_t n, const Tile& tile,
                                 ModalitySums& out) {
  out.clip_low = sum_selected(tile.low, bits, n);
  out.clip_high = sum_selected(tile.high, bits, n);
  out.ratio = sum_selected(tile.ratio, bits, n);
  if (plan.in.ref_logp != nullptr) out.kl = sum_selected(tile.kl, bits, n);
  if (plan.in.entropy != nullptr) out.entropy = sum_selected(plan.in.entropy + first, bits, n);
  extremes_selected(tile.ratio, bits, n, out);
}

template <bool kTwo>
SYNCR1_INLINE void run(const LossPlan& plan, int64_t first, int64_t n, float* grad, float* by_ratio, TileSums* sums) {
  Tile tile;
  sums->nonfinite = gather<kTwo>(plan, first, n, tile);
  ratios(plan, first, n, tile);
  policy_terms<kTwo>(plan, first, n, tile);
  apply_factor(plan, first, n, tile);
  kl_terms<kTwo>(plan, first, n, tile);
  finish(plan, n, grad + first, by_ratio == nullptr ? nullptr : by_ratio + first, tile);
  sums->loss = sum_selected(tile.loss, tile.used, n);
  if (!kTwo) {
    modality_sums(plan, first, tile.used, n, tile, sums->modality[0]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) tile.selected[i] = tile.used[i] & ~tile.image[i];
  modality_sums(plan, first, tile.selected, n, tile, sums->modality[0]);
  for (int64_t i = 0; i < n; ++i) tile.selected[i] = tile.used[i] & tile.image[i];
  modality_sums(plan, first, tile.selected, n, tile, sums->modality[1]);
}

}  // namespace

SYNCR1_LOSS_CLONES void count_tokens(const LossInputs& in, int64_t begin, int64_t end, int64_t count[2]) {
  int32_t all = static_cast<int32_t>(end - begin), image = 0;
  if (in.loss_mask != nullptr) {
    all = 0;
    for (int64_t t = begin; t < end; ++t) all += in.loss_mask[t];
  }
  if (in.modality != nullptr) {
    const uint8_t* mask = in.loss_mask == nullptr ? in.modality : in.loss_mask;
    for (int64_t t = begin; t < end; ++t) image += in.modality[t] & mask[t];
  }
  count[0] = all - image;
  count[1] = image;
}

SYNCR1_LOSS_CLONES double sum_log_ratio(const LossInputs& in, int64_t begin, int64_t end) {
  double total = 0.0;
  alignas(64) float log_ratio[kTileSize];
  alignas(64) uint32_t used[kTileSize];
  fill(used, 0, kTileSize, ~uint32_t{0});
  for (; begin < end; begin += kTileSize) {
    const int64_t n = std::min(end - begin, kTileSize);
    const float *logp = in.logp + begin, *old = in.old_logp + begin;
    for (int64_t i = 0; i < n; ++i) log_ratio[i] = clamp(logp[i] - old[i], -kMaxLogRatio, kMaxLogRatio);
    if (in.loss_mask != nullptr) spread_bits(in.loss_mask + begin, n, used);
    total += sum_selected(log_ratio, used, n);
  }
  return total;
}

SYNCR1_LOSS_CLONES void run_tile(const LossPlan& plan, int64_t index, float* grad, float* by_ratio, TileSums* sums) {
  const int64_t first = index * kTileSize;
  const int64_t n = std::min(plan.num_tokens - first, kTileSize);
  if (plan.in.modality == nullptr) {
    run<false>(plan, first, n, grad, by_ratio, sums);
  } else {
    run<true>(plan, first, n, grad, by_ratio, sums);
  }
}

SYNCR1_LOSS_CLONES void add_sequence_gradient(const LossPlan& plan, int64_t s, const float* by_ratio, float* grad) {
  const LossInputs& in = plan.in;
  if (plan.keep[s] == 0) return;
  const int64_t begin = in.cu_seqlens[s], end = in.cu_seqlens[s + 1];
  const bool mean = plan.settings.ratio == kSequence;
  const int64_t divisor = mean ? std::max<int64_t>(plan.count[0][s] + plan.count[1][s], 1) : 1;
  alignas(64) uint32_t flows[kTileSize];
  fill(flows, 0, kTileSize, ~uint32_t{0});
  double total = 0.0;
  for (int64_t t = begin; t < end; t += kTileSize) {
    total += sum_selected(by_ratio + t, flows, std::min(end - t, kTileSize));
  }
  const float value = static_cast<float>(total * static_cast<double>(plan.slope[s]) / static_cast<double>(divisor));
  for (int64_t t = begin; t < end; t += kTileSize) {
    const int64_t n = std::min(end - t, kTileSize);
    if (in.loss_mask == nullptr) {
      fill(flows, 0, n, ~uint32_t{0});
    } else {
      spread_bits(in.loss_mask + t, n, flows);
    }
    const float *logp = in.logp + t, *old = in.old_logp == nullptr ? logp : in.old_logp + t;
    for (int64_t i = 0; i < n; ++i) {
      const bool inside = std::fabs(logp[i] - old[i]) <= kMaxLogRatio;
      grad[t + i] += masked(inside ? value : 0.0f, flows[i]);
    }
  }
}

}  // namespace syncr1
