// Row-wise ops of a decoding trunk: kernels/native/trunk.py. A row's result depends on that row alone.
#include "trunk.h"

#include "abi.h"
#include "isa.h"
#include "parallel.h"

namespace {

// Elements that parallel_rows counts as one: each costs a fraction of a nanosecond, waking a thread a hundred thousand.
constexpr int64_t kCheap = 4;

const syncr1::TrunkKernels& kernels() { return *syncr1::instruction_set()->trunk; }

// Addresses of elements that are two bytes or four.
struct Elements {
  explicit Elements(int64_t is_bfloat16) : bfloat16(is_bfloat16 != 0), size(bfloat16 ? 2 : 4) {}
  const void* operator()(const void* base, int64_t element) const {
    return static_cast<const char*>(base) + element * size;
  }
  void* operator()(void* base, int64_t element) const { return static_cast<char*>(base) + element * size; }
  bool bfloat16;
  int64_t size;
};

}  // namespace

// x [num_rows, width], weight [width], output [num_rows, width] contiguous.
SYNCR1_EXPORT void syncr1_rms_norm(const void* x, const void* weight, void* output, int64_t bfloat16, int64_t num_rows,
                                   int64_t width, int64_t stride, int64_t num_threads, double eps) {
  const auto& norm = kernels().rms_norm;
  const Elements at(bfloat16);
  syncr1::parallel_rows(num_rows, width / kCheap, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      norm(at(x, row * stride), weight, at(output, row * width), width, eps, at.bfloat16);
    }
  });
}

// gate, up [num_rows, width], output [num_rows, width] contiguous.
SYNCR1_EXPORT void syncr1_silu_mul(const void* gate, const void* up, void* output, int64_t bfloat16, int64_t num_rows,
                                   int64_t width, int64_t gate_stride, int64_t up_stride, int64_t num_threads) {
  const auto& silu_mul = kernels().silu_mul;
  const Elements at(bfloat16);
  syncr1::parallel_rows(num_rows, width / kCheap, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      silu_mul(at(gate, row * gate_stride), at(up, row * up_stride), at(output, row * width), width, at.bfloat16);
    }
  });
}

// query [num_rows, num_heads, width] and key [num_rows, num_kv_heads, width] with strides {row, head}; cos, sin
// [num_rows, width]; outputs contiguous.
SYNCR1_EXPORT void syncr1_rope(const void* query, const void* key, const void* cos, const void* sin, void* query_output,
                               void* key_output, int64_t bfloat16, int64_t num_rows, int64_t num_heads,
                               int64_t num_kv_heads, int64_t width, int64_t query_stride0, int64_t query_stride1,
                               int64_t key_stride0, int64_t key_stride1, int64_t cos_stride, int64_t sin_stride,
                               int64_t num_threads) {
  const auto& rope = kernels().rope;
  const Elements at(bfloat16);
  const int64_t row_size = (num_heads + num_kv_heads) * width;
  syncr1::parallel_rows(num_rows, row_size / kCheap, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const void *cosine = at(cos, row * cos_stride), *sine = at(sin, row * sin_stride);
      rope(at(query, row * query_stride0), query_stride1, cosine, sine, at(query_output, row * num_heads * width),
           num_heads, width, at.bfloat16);
      rope(at(key, row * key_stride0), key_stride1, cosine, sine, at(key_output, row * num_kv_heads * width),
           num_kv_heads, width, at.bfloat16);
    }
  });
}
