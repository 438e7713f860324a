// What the sampler asks of one instruction set. Arrays are padded: `padded(size)` entries exist and the kernels write
// the padding, so that no loop has a remainder.
#pragma once
#include <cstdint>

#include "rows.h"

namespace syncr1 {

inline int64_t padded(int64_t size) { return (size + 63) / 64 * 64; }

struct SampleKernels {
  // z = uncond + weight (cond - uncond), or cond where `uncond` has no products; -inf at cond's forbidden ids and in
  // the padding. `rounded` is z in float.
  void (*mix)(const RowInput& cond, const RowInput& uncond, double weight, double* z, float* rounded);
  int64_t (*count_above)(const float* values, int64_t size, float bound);
  // Indices of values above the bound, ascending; returns how many.
  int64_t (*indices_above)(const float* values, int64_t size, float bound, int32_t* indices);
  // exp((z - maximum) * scale) in place, 0 in the padding.
  void (*weights)(double* z, int64_t size, double maximum, double scale);
  // Sum and number of the weights above the bound.
  double (*mass_above)(const double* weights, int64_t size, double bound, int64_t* count);
  // Weights at or below `low` become 0; the positions of those in (low, high] go to `between`. Returns how many.
  int64_t (*split)(double* weights, int64_t size, double low, double high, int32_t* between);
};

}  // namespace syncr1
