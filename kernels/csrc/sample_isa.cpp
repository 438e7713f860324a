// The sampler's sweeps over the vocabulary; compiled once per instruction set, see rows_isa.cpp.
#include "sample.h"

#include <cmath>
#include <cstring>

#include "blocks.h"
#include "vec.h"

namespace syncr1 {
namespace SYNCR1_NAMESPACE {
namespace {

// In double, where the mix of two floats is all but exact: ties stay ties, and no near-tie becomes one.
void mix(const RowInput& cond, const RowInput& uncond, double weight, double* z, float* rounded) {
  alignas(64) float block[kBlock], other[kBlock];
  Forbidden forbidden(cond), none(uncond);
  for (int64_t start = 0; start < cond.size; start += kBlock) {
    const int64_t size = block_size(cond.size, start);
    load_block(cond, start, &none, block);
    if (uncond.products != nullptr) load_block(uncond, start, &none, other);
    for (int64_t i = 0; i < size; i += kDoubles) {
      Doubles value = widen(block + i);
      if (uncond.products != nullptr) {
        const Doubles base = widen(other + i);
        value = fma(value - base, broadcast(weight), base);
      }
      store(z + start + i, value);
      store(rounded + start + i, narrow(value));
    }
    const auto exclude = [&](int64_t id) {
      z[id] = -INFINITY;
      rounded[id] = -INFINITY;
    };
    for (; forbidden.next != forbidden.end && *forbidden.next < start + kBlock; ++forbidden.next) {
      exclude(*forbidden.next);
    }
    for (int64_t i = size; i < padded(size); ++i) exclude(start + i);
  }
}

int64_t count_above(const float* values, int64_t size, float bound) {
  const Floats limit = broadcast(bound);
  Ints count = {};
  for (int64_t i = 0; i < size; i += kFloats) count -= load<Floats>(values + i) > limit;
  int64_t sum = 0;
  for (int i = 0; i < kFloats; ++i) sum += count[i];
  return sum;
}

int64_t indices_above(const float* values, int64_t size, float bound, int32_t* indices) {
  int64_t count = 0;
#if defined(__AVX512F__)
  const __m512 limit = _mm512_set1_ps(bound);
  const __m512i step = _mm512_set1_epi32(kFloats);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < size; i += kFloats, index = _mm512_add_epi32(index, step)) {
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), limit, _CMP_GT_OQ);
    // Whole vectors, the next one over the rest: a compressing store to memory is slow on some machines.
    _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(above, index));
    count += __builtin_popcount(above);
  }
#else
  for (int64_t i = 0; i < size; ++i) {
    indices[count] = static_cast<int32_t>(i);
    count += values[i] > bound ? 1 : 0;
  }
#endif
  return count;
}

void weigh(double* z, int64_t size, double maximum, double scale) {
  for (int64_t i = 0; i < size; i += kDoubles) {
    store(z + i, exponential(bounded((load<Doubles>(z + i) - maximum) * scale)));
  }
  for (int64_t i = size; i < padded(size); ++i) z[i] = 0.0;
}

double mass_above(const double* weights, int64_t size, double bound, int64_t* count) {
  const Doubles limit = broadcast(bound);
  Doubles even = {}, odd = {};
  Longs above = {};
  for (int64_t i = 0; i < size; i += 2 * kDoubles) {
    const Doubles a = load<Doubles>(weights + i), b = load<Doubles>(weights + i + kDoubles);
    even += where(a > limit, a);
    odd += where(b > limit, b);
    above -= (a > limit) + (b > limit);
  }
  *count = 0;
  for (int i = 0; i < kDoubles; ++i) *count += above[i];
  return total(even + odd);
}

int64_t split(double* weights, int64_t size, double low, double high, int32_t* between) {
  const Doubles from = broadcast(low), to = broadcast(high);
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kDoubles) {
    const Doubles weight = load<Doubles>(weights + i);
    const Longs kept = weight > from;
    store(weights + i, where(kept, weight));
    const Longs hits = kept & (weight <= to);
    if (!any(hits)) continue;
    for (int lane = 0; lane < kDoubles; ++lane) {
      if (hits[lane] != 0) between[count++] = static_cast<int32_t>(i + lane);
    }
  }
  return count;
}

}  // namespace

extern const SampleKernels sample_kernels;
const SampleKernels sample_kernels = {mix, count_above, indices_above, weigh, mass_above, split};

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
