// Log-probability and entropy of one target per row of logits: two sweeps over a row, the second from cache.
// N = rows, V = vocabulary, F = forbidden ids.
#include <cmath>
#include <cstdint>
#include <vector>

#include "abi.h"

namespace {

constexpr int64_t kBlock = 64;  // partial sums per block keep the error of a float row sum near that of a tree

struct RowSums {
  double weight = 0.0;    // sum of exp(z - max)
  double weighted = 0.0;  // sum of exp(z - max) (z - max), terms of weight 0 left out
};

RowSums sum_row(const float* row, int64_t vocabulary, float inverse_temperature, float maximum,
                const uint8_t* allowed) {
  RowSums sums;
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t end = start + kBlock < vocabulary ? start + kBlock : vocabulary;
    float weight = 0.0f, weighted = 0.0f;
    for (int64_t v = start; v < end; ++v) {
      const float shifted = (row[v] - maximum) * inverse_temperature;
      const float e = (allowed == nullptr || allowed[v]) ? std::exp(shifted) : 0.0f;
      weight += e;
      weighted += e > 0.0f ? e * shifted : 0.0f;  // 0 * (-inf) would be NaN
    }
    sums.weight += weight;
    sums.weighted += weighted;
  }
  return sums;
}

}  // namespace

SYNCR1_EXPORT void syncr1_selective_logp(const float* logits, int64_t row_stride, const int64_t* targets,
                                         int64_t num_rows, int64_t vocabulary, double temperature,
                                         const int64_t* forbidden, int64_t num_forbidden, float* logp,
                                         float* entropy) {
  std::vector<uint8_t> mask;
  if (num_forbidden > 0) {
    mask.assign(static_cast<size_t>(vocabulary), 1);
    for (int64_t i = 0; i < num_forbidden; ++i) mask[forbidden[i]] = 0;
  }
  const uint8_t* allowed = mask.empty() ? nullptr : mask.data();
  const float inverse_temperature = static_cast<float>(1.0 / temperature);
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < num_rows; ++n) {
    const float* row = logits + n * row_stride;
    float maximum = -INFINITY;
    for (int64_t v = 0; v < vocabulary; ++v) {
      if (allowed == nullptr || allowed[v]) maximum = row[v] > maximum ? row[v] : maximum;
    }
    const RowSums sums = sum_row(row, vocabulary, inverse_temperature, maximum, allowed);
    const double log_weight = std::log(sums.weight);
    const int64_t target = targets[n];
    const bool possible = allowed == nullptr || allowed[target];
    const double shifted = (static_cast<double>(row[target]) - maximum) / temperature;
    logp[n] = possible ? static_cast<float>(shifted - log_weight) : -INFINITY;
    entropy[n] = static_cast<float>(log_weight - sums.weighted / sums.weight);
  }
}
