// Rows of products and what the kernels of one instruction set do with one of them. z = (product + bias) / temperature,
// -inf at forbidden ids and outside the support; all sums are relative to the running maximum of product + bias.
#pragma once
#include <cstdint>

namespace syncr1 {

// Elements that are handled at once, in L1: whole words of a support.
constexpr int64_t kBlock = 1024;

constexpr int64_t kWord = 32;  // ids of a word of a support

inline bool keeps(const uint32_t* support, int64_t id) {
  return support == nullptr || (support[id / kWord] >> (id % kWord) & 1u) != 0;
}

inline int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

struct RowInput {
  const void* products;
  bool bfloat16;  // else float
  int64_t size;
  const float* bias;         // may be null
  const int64_t* forbidden;  // ascending
  int64_t num_forbidden;
  float inverse_temperature;
  const uint32_t* support;  // bit j of word w keeps id 32 w + j; null keeps all
};

// With d = (product + bias - maximum) / temperature.
struct RowSums {
  float maximum;    // of product + bias
  float target;     // product + bias of the target, -inf where that is forbidden
  double weight;    // sum of exp(d); NaN where the row holds NaN or +inf
  double weighted;  // sum of exp(d) d
};

// The gradient is p (by_probability + by_entropy (log p + entropy)), p = exp(z - lse).
struct RowGradient {
  float temperature_rest;  // 1 / temperature - inverse_temperature: logits of 40 would notice
  float lse;
  float lse_rest;  // what float leaves of the double: p would err by as much as lse does
  float entropy;
  float by_probability;
  float by_entropy;
};

struct RowKernels {
  // `weights` [size] and `block_maximum` [num_blocks] may both be null; else weights become exp(d) relative to the
  // block's maximum, which is the running one up to and with that block. `weights` may be the products themselves.
  void (*sums)(const RowInput& row, int64_t target, float* weights, float* block_maximum, RowSums* out);
  // out = weights * factor of the block; `out` may be `weights`.
  void (*scale)(const float* weights, const float* block_factor, int64_t size, void* out, bool bfloat16);
  // `out` may be the products themselves.
  void (*gradient)(const RowInput& row, const RowGradient& terms, void* out, bool bfloat16);
};

}  // namespace syncr1
