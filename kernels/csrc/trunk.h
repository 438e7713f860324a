// What the row-wise ops between a trunk's products ask of one instruction set, for one row at a time.
#pragma once
#include <cstdint>

namespace syncr1 {

// All pointers are to bfloat16 or all to float; elements of a row lie side by side, outputs overlap no input.
struct TrunkKernels {
  // output = weight * (x / sqrt(mean(x^2) + eps)); the normed x is rounded to its type before the product.
  void (*rms_norm)(const void* x, const void* weight, void* output, int64_t width, double eps, bool bfloat16);
  // output = silu(gate) * up; silu is rounded to the type before the product.
  void (*silu_mul)(const void* gate, const void* up, void* output, int64_t width, bool bfloat16);
  // output = x * cos + rotate_half(x) * sin, every product rounded to the type. Heads lie `stride` apart, in the output
  // side by side.
  void (*rope)(const void* x, int64_t stride, const void* cos, const void* sin, void* output, int64_t num_heads,
               int64_t width, bool bfloat16);
};

}  // namespace syncr1
