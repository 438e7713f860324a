// Group statistics over the sequence axis: advantages and the DGS keep decision. Statistics are double, in index order,
// as in kernels/reference/{advantage,select}.py. S = sequences, P = groups.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "philox.h"

namespace syncr1 {

enum class Scale : int64_t { kGroup, kBatch, kNone, kLoo };
enum class Rule : int64_t { kVarianceMass, kMaxVariance, kTopK, kRandom, kNone };

constexpr double kMassSlack = 1e-9;
constexpr double kSpread = 0x1p-21;  // SPREAD of kernels/reference/advantage.py: below, rewards differ by rounding alone
constexpr uint32_t kRandomStream = 1;

struct Statistics {
  int64_t count = 0;
  double mean = 0.0;
  double standard_deviation = 0.0;  // unbiased; 0 with fewer than two values
  bool varies = false;
};

// Over the values of [begin, end) that are not NaN.
inline Statistics describe(const double* begin, const double* end) {
  Statistics s;
  double sum = 0.0, lowest = INFINITY, highest = -INFINITY;
  for (const double* r = begin; r != end; ++r) {
    if (std::isnan(*r)) continue;
    ++s.count;
    sum += *r;
    lowest = std::min(lowest, *r);
    highest = std::max(highest, *r);
  }
  s.varies = highest - lowest > kSpread * std::max(std::abs(highest), std::abs(lowest));
  s.mean = sum / static_cast<double>(std::max<int64_t>(s.count, 1));
  double squares = 0.0;
  for (const double* r = begin; r != end; ++r) {
    if (!std::isnan(*r)) squares += (*r - s.mean) * (*r - s.mean);
  }
  s.standard_deviation = std::sqrt(squares / static_cast<double>(std::max<int64_t>(s.count - 1, 1)));
  return s;
}

// The first entries of `ranked` that hold `mass` of the group's energy.
inline int64_t variance_mass_size(const std::vector<int64_t>& ranked, const double* energy, double mass,
                                  int64_t min_keep) {
  double total = 0.0;
  for (int64_t s : ranked) total += energy[s];
  const double wanted = mass * total * (1.0 - kMassSlack);
  const int64_t size = static_cast<int64_t>(ranked.size());
  int64_t kept = 0;
  for (double held = 0.0; kept < size && held < wanted; ++kept) held += energy[ranked[kept]];
  return std::min(std::max(kept, min_keep), size);
}

// How many of the highest belong to the subset of `size` with the greatest variance; the others are the lowest.
inline int64_t max_variance_high(const std::vector<int64_t>& ranked, const double* reward, int64_t size) {
  const int64_t n = static_cast<int64_t>(ranked.size());
  int64_t best = size;
  double best_variance = -1.0;
  for (int64_t high = size; high >= 0; --high) {
    double mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < size; ++i) mean += reward[ranked[i < high ? i : n - size + i]];
    mean /= static_cast<double>(size);
    for (int64_t i = 0; i < size; ++i) {
      const double centred = reward[ranked[i < high ? i : n - size + i]] - mean;
      variance += centred * centred;
    }
    variance /= static_cast<double>(size);
    if (variance > best_variance * (1.0 + kMassSlack)) {
      best = high;
      best_variance = variance;
    }
  }
  return best;
}

// Writes [S] advantages; where `varies` [P] is given, sets it for the groups whose valid rewards are not all equal.
inline void group_advantages(const double* reward, const int64_t* offsets, int64_t num_groups, Scale scale, double eps,
                             float* out, uint8_t* varies) {
  double batch_std = 0.0;
  if (scale == Scale::kBatch) batch_std = describe(reward, reward + offsets[num_groups]).standard_deviation;
  for (int64_t p = 0; p < num_groups; ++p) {
    const Statistics s = describe(reward + offsets[p], reward + offsets[p + 1]);
    double factor = 1.0;
    double divisor = 1.0;
    if (scale == Scale::kGroup) divisor = s.standard_deviation + eps;
    if (scale == Scale::kBatch) divisor = batch_std + eps;
    const double count = static_cast<double>(s.count);
    if (scale == Scale::kLoo) factor = count / std::max(count - 1.0, 1.0);
    for (int64_t i = offsets[p]; i < offsets[p + 1]; ++i) {
      const bool used = s.varies && !std::isnan(reward[i]);
      out[i] = used ? static_cast<float>((reward[i] - s.mean) * factor / divisor) : 0.0f;
    }
    if (varies != nullptr && s.varies) varies[p] = 1;
  }
}

struct Selection {
  Rule rule;
  double mass;
  int64_t keep;  // negative: half of the group, rounded up
  int64_t min_keep, seed;
};

// Writes [S] 0/1: which sequences of each group the rule keeps.
inline void dgs_select(const double* energy, const double* reward, const int64_t* offsets, int64_t num_groups,
                       const Selection& selection, uint8_t* out) {
  const Rule rule = selection.rule;
  std::fill(out, out + offsets[num_groups], static_cast<uint8_t>(rule == Rule::kNone));
  if (rule == Rule::kNone) return;
  std::vector<int64_t> ranked;
  for (int64_t p = 0; p < num_groups; ++p) {
    ranked.clear();
    double highest = 0.0;
    for (int64_t s = offsets[p]; s < offsets[p + 1]; ++s) {
      if (std::isnan(reward[s])) continue;
      ranked.push_back(s);
      highest = std::max(highest, energy[s]);
    }
    if (!(highest > 0.0)) continue;
    // Stable: ties stay in index order.
    const bool by_energy = rule == Rule::kVarianceMass || rule == Rule::kRandom;
    const double* key = by_energy ? energy : reward;
    std::stable_sort(ranked.begin(), ranked.end(), [key](int64_t a, int64_t b) { return key[a] > key[b]; });
    const int64_t members = static_cast<int64_t>(ranked.size());
    const int64_t half = (offsets[p + 1] - offsets[p] + 1) / 2;
    int64_t size = std::min(std::max(selection.min_keep, selection.keep < 0 ? half : selection.keep), members);
    int64_t high = size;
    if (by_energy) high = size = variance_mass_size(ranked, energy, selection.mass, selection.min_keep);
    if (rule == Rule::kMaxVariance) high = max_variance_high(ranked, reward, size);
    if (rule == Rule::kRandom) {
      std::sort(ranked.begin(), ranked.end());
      std::vector<double> draw(static_cast<size_t>(offsets[p + 1] - offsets[p]));
      for (int64_t s : ranked) draw[s - offsets[p]] = uniform(selection.seed, s, kRandomStream);
      std::stable_sort(ranked.begin(), ranked.end(),
                       [&](int64_t a, int64_t b) { return draw[a - offsets[p]] < draw[b - offsets[p]]; });
    }
    for (int64_t i = 0; i < size; ++i) out[ranked[i < high ? i : members - size + i]] = 1;
  }
}

}  // namespace syncr1
