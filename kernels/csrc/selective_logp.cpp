// Log-probability and entropy of one target per row of logits: two sweeps over a row, the second from cache.
//
// The row loops run over a fixed number of lanes and are compiled for several instruction sets, chosen when the library
// is loaded; without contraction to FMA every one of them gives the same bits. N = rows, V = vocabulary.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SYNCR1_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SYNCR1_CLONES
#endif

namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 1024;  // float sums end here and go on in double
constexpr float kLowest = -87.0f;

struct RowSums {
  double weight = 0.0;    // sum of exp(s), s = (z - max) / temperature
  double weighted = 0.0;  // sum of exp(s) s
};

// exp of kLowest <= x <= 0 to about 1 ulp, without branches so that loops over it vectorise (Cephes expf); keeps NaN.
inline __attribute__((always_inline)) float exp_nonpositive(float x) {
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
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

SYNCR1_CLONES float row_maximum(const float* row, int64_t vocabulary) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = -INFINITY;
  int64_t v = 0;
  for (; v + kLanes <= vocabulary; v += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] = row[v + i] > lane[i] ? row[v + i] : lane[i];
  }
  float maximum = -INFINITY;
  for (; v < vocabulary; ++v) maximum = row[v] > maximum ? row[v] : maximum;
  for (int i = 0; i < kLanes; ++i) maximum = lane[i] > maximum ? lane[i] : maximum;
  return maximum;
}

SYNCR1_CLONES RowSums row_sums(const float* row, int64_t vocabulary, float inverse_temperature, float maximum) {
  RowSums sums;
  float weights[kBlock], weighteds[kBlock];
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const int64_t size = vocabulary - start < kBlock ? vocabulary - start : kBlock;
    for (int64_t v = 0; v < size; ++v) {
      const float s = (row[start + v] - maximum) * inverse_temperature;
      // exp(-87) is 1e-38, nothing beside the maximum's 1; the bound keeps -inf away from 0 * (-inf).
      const float bounded = s < kLowest ? kLowest : s;
      weights[v] = exp_nonpositive(bounded);
      weighteds[v] = weights[v] * bounded;
    }
    for (int64_t v = size; v % kLanes != 0; ++v) weights[v] = weighteds[v] = 0.0f;
    float weight[kLanes] = {}, weighted[kLanes] = {};
    for (int64_t v = 0; v < size; v += kLanes) {
      for (int i = 0; i < kLanes; ++i) weight[i] += weights[v + i];
      for (int i = 0; i < kLanes; ++i) weighted[i] += weighteds[v + i];
    }
    for (int i = 0; i < kLanes; ++i) {
      sums.weight += weight[i];
      sums.weighted += weighted[i];
    }
  }
  return sums;
}

}  // namespace

SYNCR1_EXPORT void syncr1_selective_logp(const float* logits, int64_t row_stride, const int64_t* targets,
                                         int64_t num_rows, int64_t vocabulary, double temperature,
                                         const int64_t* forbidden, int64_t num_forbidden, float* logp,
                                         float* entropy) {
  const float inverse_temperature = static_cast<float>(1.0 / temperature);
#pragma omp parallel
  {
    std::vector<float> copy(num_forbidden > 0 ? static_cast<size_t>(vocabulary) : 0);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < num_rows; ++n) {
      const float* row = logits + n * row_stride;
      if (num_forbidden > 0) {
        std::memcpy(copy.data(), row, static_cast<size_t>(vocabulary) * sizeof(float));
        for (int64_t i = 0; i < num_forbidden; ++i) copy[forbidden[i]] = -INFINITY;
        row = copy.data();
      }
      const float maximum = row_maximum(row, vocabulary);
      const RowSums sums = row_sums(row, vocabulary, inverse_temperature, maximum);
      const double log_weight = std::log(sums.weight);
      logp[n] = static_cast<float>((static_cast<double>(row[targets[n]]) - maximum) / temperature - log_weight);
      entropy[n] = static_cast<float>(log_weight - sums.weighted / sums.weight);
    }
  }
}
