// One row at a time, in blocks that stay in L1; compiled once per instruction set. Uses no standard library templates:
// the linker could hand this set's copy of one to code that runs on every machine.
#include "rows.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "blocks.h"
#include "vec.h"

namespace syncr1 {
namespace SYNCR1_NAMESPACE {
namespace {

// A lane adds up so many floats before the sum goes on in double: equal values would err in the same direction.
constexpr int64_t kShort = 16 * kFloats;

struct BlockSums {
  double weight, weighted;
};

// `block` becomes exp(d). Meanwhile the `stride` bytes per vector that lie at `ahead` are fetched from memory.
SYNCR1_INLINE BlockSums exponentiate(float* block, int64_t size, float maximum, float inverse_temperature,
                                     const char* ahead, int64_t stride) {
  const Floats shift = broadcast(maximum);
  Doubles weights = {}, weighteds = {};
  for (int64_t start = 0; start < size; start += kShort) {
    const int64_t end = size < start + kShort ? size : start + kShort;
    Floats weight = {}, weighted = {};
    for (int64_t i = start; i < end; i += kFloats) {
      __builtin_prefetch(ahead);
      ahead += stride;
      const Floats d = bounded((load<Floats>(block + i) - shift) * inverse_temperature);
      const Floats e = exponential(d);
      store(block + i, e);
      weight += e;
      weighted = fma(e, d, weighted);
    }
    weights += pair_sums(weight);
    weighteds += pair_sums(weighted);
  }
  return {total(weights), total(weighteds)};
}

// The sums so far, made relative to a greater maximum.
SYNCR1_INLINE void rescale(RowSums* sums, float maximum, float inverse_temperature) {
  if (sums->maximum != -INFINITY) {
    const double shift = (static_cast<double>(sums->maximum) - maximum) * inverse_temperature;
    const double factor = ::exp(shift);
    sums->weighted = factor * (sums->weighted + shift * sums->weight);
    sums->weight *= factor;
  }
  sums->maximum = maximum;
}

void row_sums(const RowInput& row, int64_t target, float* weights, float* block_maximum, RowSums* out) {
  alignas(64) float block[kBlock];
  RowSums sums = {-INFINITY, -INFINITY, 0.0, 0.0};
  Forbidden forbidden(row);
  for (int64_t start = 0; start < row.size; start += kBlock) {
    const int64_t size = load_block(row, start, &forbidden, block);
    const float maximum = block_largest(block, size);
    if (target >= start && target < start + kBlock) sums.target = block[target - start];
    if (maximum > sums.maximum) rescale(&sums, maximum, row.inverse_temperature);
    if (sums.maximum == -INFINITY) {
      // Nothing but -inf so far, unless there is NaN, which no maximum sees.
      for (int64_t i = 0; i < size; ++i) {
        if (block[i] != block[i]) sums.weight = sums.weighted = NAN;
        block[i] = 0.0f;
      }
    } else {
      const char* ahead = next_block(row, start);
      const BlockSums added =
          exponentiate(block, size, sums.maximum, row.inverse_temperature, ahead, vector_bytes(row));
      sums.weight += added.weight;
      sums.weighted += added.weighted;
    }
    if (weights != nullptr) {
      std::memcpy(weights + start, block, static_cast<size_t>(block_size(row.size, start)) * sizeof(float));
      block_maximum[start / kBlock] = sums.maximum;
    }
  }
  *out = sums;
}

void scale_row(const float* weights, const float* block_factor, int64_t size, void* out, bool bfloat16) {
  alignas(64) float block[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = block_size(size, start);
    const float factor = block_factor[start / kBlock];
    int64_t i = 0;
    for (; i + kFloats <= count; i += kFloats) store(block + i, load<Floats>(weights + start + i) * factor);
    for (; i < count; ++i) block[i] = weights[start + i] * factor;
    store_block(block, out, bfloat16, start, count);
  }
}

void row_gradient(const RowInput& row, const RowGradient& terms, void* out, bool bfloat16) {
  alignas(64) float block[kBlock];
  Forbidden forbidden(row);
  const int64_t stride = vector_bytes(row);
  for (int64_t start = 0; start < row.size; start += kBlock) {
    const int64_t size = load_block(row, start, &forbidden, block);
    const char* ahead = next_block(row, start);
    for (int64_t i = 0; i < size; i += kFloats) {
      const Floats z = load<Floats>(block + i);
      __builtin_prefetch(ahead);
      ahead += stride;
      const Floats nearly = fma(z, broadcast(row.inverse_temperature), broadcast(-terms.lse));
      const Floats finite = where(z > -FLT_MAX, z);
      const Floats rest = fma(finite, broadcast(terms.temperature_rest), broadcast(-terms.lse_rest));
      const Floats d = bounded(nearly + rest);
      const Floats by_entropy = (d + terms.entropy) * terms.by_entropy;
      store(block + i, exponential(d) * (by_entropy + terms.by_probability));
    }
    store_block(block, out, bfloat16, start, block_size(row.size, start));
  }
}

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels = {row_sums, scale_row, row_gradient};

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
