// What one decode step over a shared prefix asks of one instruction set: attention of several queries to the columns
// of a span, span after span, by the online softmax.
#pragma once
#include <cstdint>

namespace syncr1 {

constexpr int64_t kTileColumns = 64;  // keys that are scored at once
constexpr int64_t kQueryBlock = 8;    // queries whose scores are held at once
constexpr int64_t kSumLanes = 8;      // partial sums per query

// Columns of one head: `length` keys and values of `width` elements.
struct Span {
  const void *keys, *values;  // bfloat16 or float, unit stride within a column
  int64_t key_stride, value_stride, length;
  bool bfloat16;
};

// Outputs are padded to whole vectors of every set.
inline int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }

// Softmax so far of each query: outputs / total of sums, both relative to exp(maxima).
struct Attention {
  const float* queries;  // [num_queries, width], times the scale
  float* outputs;        // [num_queries, padded_width]
  float* maxima;         // [num_queries], -inf before the first span
  double* sums;          // [num_queries, kSumLanes]
  int64_t num_queries, width;
};

// Transposed keys, values in float, scores.
inline int64_t scratch_floats(int64_t width) {
  return kTileColumns * (width + padded_width(width) + kQueryBlock);
}

struct DecodeKernels {
  // Takes one more span into account. What a query gets is the same whichever others stand beside it. Meanwhile the
  // beginning of `next` (may be null) is fetched from memory. `scratch` is 64-byte aligned.
  void (*attend)(const Span& span, const Span* next, const Attention& attention, float* scratch);
};

}  // namespace syncr1
