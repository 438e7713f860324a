// Classifier-free-guided sampling of one token per row: kernels/reference/sample.py with its sums in double.
//
// No row is sorted. top_k narrows down a bound on the logits, top_p one on the probabilities, until only a few entries
// lie around it; those are put in order. min_p is a bound by itself. Every row is computed by one thread from its own values alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "abi.h"
#include "bfloat16.h"
#include "isa.h"
#include "parallel.h"
#include "philox.h"

// Same fields as `Sampling` in kernels/native/sample.py.
struct syncr1_sampling {
  const void *cond, *uncond;  // [num_rows, vocabulary], bfloat16 or float; uncond may be null
  const int64_t* forbidden;   // [num_forbidden], any order
  const int64_t *seed, *offset;  // [num_rows]
  uint32_t* support;             // [num_rows, ceil(vocabulary / 32)], written; null: not wanted
  int64_t cond_bfloat16, uncond_bfloat16, cond_stride, uncond_stride;
  int64_t num_rows, vocabulary, num_forbidden, top_k, num_threads;
  double cfg_weight, temperature, top_p, min_p;
};

namespace {

using syncr1::padded;
using syncr1::RowInput;
using syncr1::RowSums;

constexpr int64_t kFew = 16;         // so many entries are put in order
constexpr int64_t kSumBlock = 128;   // entries whose sum is taken at once in the search
constexpr int kLinearSteps = 48;     // then a bound is narrowed down by its bits, which ends after 32 more

// What one thread needs for one row.
struct Scratch {
  explicit Scratch(int64_t vocabulary)
      : rounded(static_cast<size_t>(padded(vocabulary))),
        z(rounded.size()),
        weights(rounded.size()),
        ids(rounded.size() + 16) {}
  std::vector<float> rounded;   // mixed logits
  std::vector<double> z;        // the same
  std::vector<double> weights;  // exp((z - max) / temperature) of the candidates
  std::vector<int32_t> ids;     // of the candidates, ascending
  std::vector<int32_t> border;  // candidates around a bound
};

// The candidates of a row: positions [0, size) of `weights`.
struct Candidates {
  int64_t size;
  bool all;  // position = id
};

class Sampler {
 public:
  explicit Sampler(const syncr1_sampling& in)
      : in_(in),
        kernels_(*syncr1::instruction_set()),
        forbidden_(in.forbidden, in.forbidden + in.num_forbidden),
        temperature_(in.temperature == 0.0 ? 1.0 : in.temperature) {
    std::sort(forbidden_.begin(), forbidden_.end());
  }

  void row(int64_t n, Scratch* scratch, int64_t* token, float* logp, float* logp_mixed, float* entropy) const;

 private:
  RowInput input(const void* products, bool bfloat16, const std::vector<int64_t>& forbidden) const {
    const int64_t num_forbidden = static_cast<int64_t>(forbidden.size());
    const float inverse_temperature = static_cast<float>(1.0 / temperature_);
    return {products, bfloat16, in_.vocabulary, nullptr, forbidden.data(), num_forbidden, inverse_temperature, nullptr};
  }

  Candidates keep_top_k(Scratch* scratch, float largest) const;
  void keep_top_p(Scratch* scratch, const Candidates& candidates) const;
  void keep_min_p(Scratch* scratch, const Candidates& candidates) const;
  int64_t greedy(Scratch* scratch, float largest) const;
  int64_t draw(Scratch* scratch, const Candidates& candidates, double uniform) const;

  const syncr1_sampling& in_;
  const syncr1::InstructionSet& kernels_;
  std::vector<int64_t> forbidden_;
  double temperature_;
};

// Order of floats and of integers agree; -0 comes before 0.
int32_t ordered(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}

float from_ordered(int32_t key) {
  const int32_t bits = key < 0 ? std::numeric_limits<int32_t>::min() - key : key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Two bounds around the k-th greatest: at least k values lie above `low`, fewer than k above `high`.
struct Bounds {
  float low, high;
  int64_t above_low, above_high;
};

Bounds narrow(const syncr1::SampleKernels& kernels, const float* values, int64_t size, int64_t k, float largest) {
  Bounds b = {-std::numeric_limits<float>::infinity(), largest, size, 0};
  // Logits lie within tens of the greatest one: look there first.
  for (float reach = 4.0f; reach < 1e30f; reach *= 2.0f) {
    const float low = largest - reach;
    const int64_t above = kernels.count_above(values, size, low);
    if (above >= k) {
      b.low = low;
      b.above_low = above;
      break;
    }
    b.high = low;
    b.above_high = above;
  }
  for (int step = 0; b.above_low - b.above_high > kFew; ++step) {
    float middle = 0.5f * b.low + 0.5f * b.high;
    if (step >= kLinearSteps || !(middle > b.low && middle < b.high)) {
      const int64_t low = ordered(b.low), high = ordered(b.high);
      if (high - low <= 1) break;
      middle = from_ordered(static_cast<int32_t>(low + (high - low) / 2));
    }
    const int64_t above = kernels.count_above(values, size, middle);
    if (above >= k) {
      b.low = middle;
      b.above_low = above;
    } else {
      b.high = middle;
      b.above_high = above;
    }
  }
  return b;
}

// Sorts positions by falling value, equal ones by rising position.
template <typename Value>
void sort_falling(std::vector<int32_t>* positions, const Value& value) {
  std::sort(positions->begin(), positions->end(), [&](int32_t a, int32_t b) {
    const double left = value(a), right = value(b);
    return left != right ? left > right : a < b;
  });
}

// Weights of the top_k (0 at the few entries that are in the lists but not among them).
Candidates Sampler::keep_top_k(Scratch* scratch, float largest) const {
  const syncr1::SampleKernels& kernels = *kernels_.sample;
  const int64_t k = in_.top_k;
  const double inverse_temperature = 1.0 / temperature_;
  double* weights = scratch->weights.data();
  if (k == 0 || k >= in_.vocabulary) {
    std::copy(scratch->z.begin(), scratch->z.end(), scratch->weights.begin());
    kernels.weights(weights, in_.vocabulary, largest, inverse_temperature);
    return {in_.vocabulary, true};
  }
  const Bounds bounds = narrow(kernels, scratch->rounded.data(), in_.vocabulary, k, largest);
  const int64_t size = kernels.indices_above(scratch->rounded.data(), in_.vocabulary, bounds.low, scratch->ids.data());
  scratch->border.clear();
  for (int64_t i = 0; i < size; ++i) {
    const int32_t id = scratch->ids[i];
    weights[i] = scratch->z[id];
    if (size > k && scratch->rounded[id] <= bounds.high) scratch->border.push_back(static_cast<int32_t>(i));
  }
  if (size > k) sort_falling(&scratch->border, [&](int32_t i) { return scratch->z[scratch->ids[i]]; });
  kernels.weights(weights, size, largest, inverse_temperature);
  for (size_t i = static_cast<size_t>(k - bounds.above_high); i < scratch->border.size(); ++i) {
    weights[scratch->border[i]] = 0.0;
  }
  return {size, false};
}

// 0 outside the smallest set that holds top_p of the candidates.
void Sampler::keep_top_p(Scratch* scratch, const Candidates& candidates) const {
  const syncr1::SampleKernels& kernels = *kernels_.sample;
  double* weights = scratch->weights.data();
  int64_t above_low = 0, above_high = 0;
  const double wanted = in_.top_p * kernels.mass_above(weights, candidates.size, 0.0, &above_low);
  // Weights up to `low` may hold what top_p leaves out, but no more; those above `high` hold less than top_p.
  double low = 0.0, high = 2.0, mass_above_high = 0.0;
  int64_t count = 0;
  const double start = (1.0 - 1e-9) * (1.0 / in_.top_p - 1.0) * wanted / static_cast<double>(candidates.size);
  if (kernels.mass_above(weights, candidates.size, start, &count) >= wanted) {
    low = start;
    above_low = count;
  }
  while (above_low - above_high > kFew) {
    int64_t low_bits, high_bits;
    std::memcpy(&low_bits, &low, sizeof low);
    std::memcpy(&high_bits, &high, sizeof high);
    if (high_bits - low_bits <= 1) break;
    const int64_t middle_bits = low_bits + (high_bits - low_bits) / 2;
    double middle;
    std::memcpy(&middle, &middle_bits, sizeof middle);
    const double mass = kernels.mass_above(weights, candidates.size, middle, &count);
    if (mass >= wanted) {
      low = middle;
      above_low = count;
    } else {
      high = middle;
      above_high = count;
      mass_above_high = mass;
    }
  }
  scratch->border.resize(scratch->ids.size());
  scratch->border.resize(kernels.split(weights, candidates.size, low, high, scratch->border.data()));
  sort_falling(&scratch->border, [&](int32_t i) { return scratch->z[candidates.all ? i : scratch->ids[i]]; });
  double before = mass_above_high;
  for (const int32_t i : scratch->border) {
    const double weight = weights[i];
    if (before >= wanted) weights[i] = 0.0;
    before += weight;
  }
}

// 0 at less than min_p of the greatest weight: 1, but for the rounding of the maximum that they are relative to.
void Sampler::keep_min_p(Scratch* scratch, const Candidates& candidates) const {
  double* weights = scratch->weights.data();
  double greatest = 0.0;
  for (int64_t i = 0; i < candidates.size; ++i) greatest = std::max(greatest, weights[i]);
  const double least = in_.min_p * greatest;
  for (int64_t i = 0; i < candidates.size; ++i) weights[i] = weights[i] < least ? 0.0 : weights[i];
}

// The bits of the ids that could be drawn.
void write_support(const Scratch& scratch, const Candidates& candidates, uint32_t* support) {
  for (int64_t i = 0; i < candidates.size; ++i) {
    const int64_t id = candidates.all ? i : scratch.ids[static_cast<size_t>(i)];
    const uint32_t kept = scratch.weights[static_cast<size_t>(i)] > 0.0 ? 1u : 0u;
    support[id / syncr1::kWord] |= kept << (id % syncr1::kWord);
  }
}

// Greedy decoding leaves nothing out.
void write_support(const std::vector<double>& z, int64_t vocabulary, uint32_t* support) {
  for (int64_t id = 0; id < vocabulary; ++id) {
    const uint32_t kept = z[static_cast<size_t>(id)] > -std::numeric_limits<double>::infinity() ? 1u : 0u;
    support[id / syncr1::kWord] |= kept << (id % syncr1::kWord);
  }
}

// The first id of the greatest logit.
int64_t Sampler::greedy(Scratch* scratch, float largest) const {
  const double* z = scratch->z.data();
  int64_t best = -1;
  for (int64_t v = 0; v < in_.vocabulary; ++v) {
    if (scratch->rounded[v] == largest && (best < 0 || z[v] > z[best])) best = v;
  }
  return std::max<int64_t>(best, 0);
}

// The first id whose running sum exceeds the uniform's share of the total.
int64_t Sampler::draw(Scratch* scratch, const Candidates& candidates, double uniform) const {
  const double* weights = scratch->weights.data();
  const auto block_sum = [&](int64_t start) {
    int64_t count;
    return kernels_.sample->mass_above(weights + start, std::min(kSumBlock, candidates.size - start), 0.0, &count);
  };
  double total = 0.0;
  for (int64_t start = 0; start < candidates.size; start += kSumBlock) total += block_sum(start);
  const double threshold = uniform * total;
  double sum = 0.0;
  int64_t start = 0;
  for (; start + kSumBlock < candidates.size; start += kSumBlock) {
    const double next = sum + block_sum(start);
    if (next > threshold) break;
    sum = next;
  }
  int64_t drawn = start;
  for (int64_t i = start; i < std::min(start + kSumBlock, candidates.size); ++i) {
    if (!(weights[i] > 0.0)) continue;
    drawn = i;  // the last one stands where rounding of the block's own sum leaves the threshold beyond it
    sum += weights[i];
    if (sum > threshold) break;
  }
  return candidates.all ? drawn : scratch->ids[drawn];
}

void Sampler::row(int64_t n, Scratch* scratch, int64_t* token, float* logp, float* logp_mixed, float* entropy) const {
  static const std::vector<int64_t> kNone;
  const auto at = [n](const void* rows, int64_t stride, int64_t bfloat16) -> const void* {
    return rows == nullptr ? nullptr : static_cast<const char*>(rows) + n * stride * (bfloat16 != 0 ? 2 : 4);
  };
  RowInput cond = input(at(in_.cond, in_.cond_stride, in_.cond_bfloat16), in_.cond_bfloat16 != 0, forbidden_);
  const RowInput uncond = input(at(in_.uncond, in_.uncond_stride, in_.uncond_bfloat16), in_.uncond_bfloat16 != 0, kNone);
  RowInput guided = input(scratch->rounded.data(), false, kNone);
  RowSums sums, mixed;
  kernels_.rows->sums(cond, -1, nullptr, nullptr, &sums);
  kernels_.sample->mix(cond, uncond, in_.cfg_weight, scratch->z.data(), scratch->rounded.data());
  mixed = sums;
  if (uncond.products != nullptr) {
    kernels_.rows->sums(guided, -1, nullptr, nullptr, &mixed);
  }
  *token = 0;
  if (!(mixed.weight > 0.0)) {  // a row with NaN or +inf has no distribution
    *logp = *logp_mixed = *entropy = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const int64_t words = (in_.vocabulary + syncr1::kWord - 1) / syncr1::kWord;
  uint32_t* support = in_.support == nullptr ? nullptr : in_.support + n * words;
  if (in_.temperature == 0.0) {
    *token = greedy(scratch, mixed.maximum);
    if (support != nullptr) write_support(scratch->z, in_.vocabulary, support);
  } else {
    const Candidates candidates = keep_top_k(scratch, mixed.maximum);
    if (in_.top_p < 1.0) keep_top_p(scratch, candidates);
    if (in_.min_p > 0.0) keep_min_p(scratch, candidates);
    if (support != nullptr) write_support(*scratch, candidates, support);
    *token = draw(scratch, candidates, syncr1::uniform(in_.seed[n], in_.offset[n], 0));
  }
  if (support != nullptr) {
    cond.support = guided.support = support;
    kernels_.rows->sums(cond, -1, nullptr, nullptr, &sums);
    mixed = sums;
    if (uncond.products != nullptr) kernels_.rows->sums(guided, -1, nullptr, nullptr, &mixed);
  }
  const double log_weight = std::log(sums.weight);
  *entropy = static_cast<float>(log_weight - sums.weighted / sums.weight);
  const double product = cond.bfloat16 ? syncr1::from_bfloat16(static_cast<const uint16_t*>(cond.products)[*token])
                                       : static_cast<const float*>(cond.products)[*token];
  *logp = static_cast<float>((product - sums.maximum) / temperature_ - log_weight);
  // Over a support what the sums were taken of, so that a set of one id has log-probability 0 exactly.
  const double z = support == nullptr ? scratch->z[*token] : static_cast<double>(scratch->rounded[*token]);
  *logp_mixed = static_cast<float>((z - mixed.maximum) / temperature_ - std::log(mixed.weight));
}

}  // namespace

SYNCR1_EXPORT void syncr1_sample(const syncr1_sampling* in, int64_t* token, float* logp, float* logp_mixed,
                                 float* entropy) {
  const Sampler sampler(*in);
  syncr1::parallel_rows(in->num_rows, in->vocabulary, in->num_threads, [&](int64_t first, int64_t last) {
    Scratch scratch(in->vocabulary);
    for (int64_t n = first; n < last; ++n) sampler.row(n, &scratch, token + n, logp + n, logp_mixed + n, entropy + n);
  });
}
