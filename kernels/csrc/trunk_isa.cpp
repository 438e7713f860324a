// One row of each op at a time; compiled once per instruction set, see rows_isa.cpp.
#include "trunk.h"

#include <cmath>
#include <cstring>

#include "vec.h"

// Of lambdas that two loops call.
#define SYNCR1_INLINED __attribute__((always_inline))

namespace syncr1 {
namespace SYNCR1_NAMESPACE {
namespace {

// Sums side by side hide the latency of an addition.
constexpr int kSums = 4;
// A lane adds up so many floats before the sum goes on in double: equal values would err in the same direction.
constexpr int64_t kShort = 16 * kSums * kFloats;

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // without a mask GCC 12 warns about its own header
#endif

// Whole vectors of bfloat16: GCC 12 takes the portable conversions of vec.h apart.
SYNCR1_INLINE Words load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

SYNCR1_INLINE void store_halves(uint16_t* to, Words words) {  // each below 2^16
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(kAll, (__m512i)words));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  store(to, __builtin_convertvector(words, Halves));
#endif
}

// Rounded to nearest, ties to even, in the upper halves; the lower ones are anything. A NaN stays one.
SYNCR1_INLINE Words nearest_bfloat16(Floats v) {
  const Words bits = (Words)v;
  return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

SYNCR1_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
SYNCR1_INLINE Floats load_floats(const uint16_t* from) { return (Floats)(load_halves(from) << 16); }
SYNCR1_INLINE void store_floats(float* to, Floats v) { store(to, v); }
SYNCR1_INLINE void store_floats(uint16_t* to, Floats v) { store_halves(to, nearest_bfloat16(v) >> 16); }

// To the precision of the elements and back.
SYNCR1_INLINE Floats rounded(const float*, Floats v) { return v; }
SYNCR1_INLINE Floats rounded(const uint16_t*, Floats v) { return (Floats)(nearest_bfloat16(v) & 0xffff0000u); }

// The first `count` lanes, zeros after them.
template <typename Element>
SYNCR1_INLINE Floats load_some(const Element* from, int64_t count) {
  Element lanes[kFloats] = {};
  std::memcpy(lanes, from, count * sizeof(Element));
  return load_floats(lanes);
}

template <typename Element>
SYNCR1_INLINE void store_some(Element* to, Floats v, int64_t count) {
  Element lanes[kFloats];
  store_floats(lanes, v);
  std::memcpy(to, lanes, count * sizeof(Element));
}

// output[i] = term(a[i], b[i]).
template <typename Element, typename Term>
SYNCR1_INLINE void map(const Element* a, const Element* b, Element* output, int64_t size, Term term) {
  int64_t i = 0;
  for (; i + kFloats <= size; i += kFloats) store_floats(output + i, term(load_floats(a + i), load_floats(b + i)));
  if (i < size) store_some(output + i, term(load_some(a + i, size - i), load_some(b + i, size - i)), size - i);
}

template <typename Element>
SYNCR1_INLINE double sum_of_squares(const Element* x, int64_t size) {
  Doubles sum = {};
  int64_t i = 0;
  while (i + kSums * kFloats <= size) {
    const int64_t end = size < i + kShort ? size : i + kShort;
    Floats sums[kSums] = {};
    for (; i + kSums * kFloats <= end; i += kSums * kFloats) {
      for (int j = 0; j < kSums; ++j) {
        const Floats v = load_floats(x + i + j * kFloats);
        sums[j] = fma(v, v, sums[j]);
      }
    }
    for (int j = 0; j < kSums; ++j) sum += pair_sums(sums[j]);
  }
  for (; i < size; i += kFloats) {
    const Floats v = i + kFloats <= size ? load_floats(x + i) : load_some(x + i, size - i);
    sum += pair_sums(v * v);
  }
  return total(sum);
}

template <typename Element>
SYNCR1_INLINE void norm_row(const Element* x, const Element* weight, Element* output, int64_t width, double eps) {
  const double mean = sum_of_squares(x, width) / static_cast<double>(width);
  const float inverse = static_cast<float>(1.0 / ::sqrt(mean + eps));
  map(x, weight, output, width, [=](Floats v, Floats w) SYNCR1_INLINED { return w * rounded(x, v * inverse); });
}

// exp is taken of -|x| alone, which cannot overflow.
SYNCR1_INLINE Floats silu(Floats x) {
  const Floats power = exponential(bounded((Floats)((Words)x | 0x80000000u)));
  return (x < 0.0f ? x * power : x) / (power + 1.0f);
}

template <typename Element>
SYNCR1_INLINE void silu_row(const Element* gate, const Element* up, Element* output, int64_t width) {
  map(gate, up, output, width, [=](Floats g, Floats u) SYNCR1_INLINED { return rounded(gate, silu(g)) * u; });
}

// output[i] = x[i] * cos[i] + sign * other[i] * sin[i], without FMA: as the products were rounded one by one.
template <typename Element>
SYNCR1_INLINE void rotate(const Element* x, const Element* other, float sign, const Element* cos, const Element* sin,
                          Element* output, int64_t size) {
  int64_t i = 0;
  const auto term = [=](Floats a, Floats b, Floats c, Floats s) SYNCR1_INLINED {
    return rounded(x, a * c) + rounded(x, b * sign * s);
  };
  for (; i + kFloats <= size; i += kFloats) {
    store_floats(output + i,
                 term(load_floats(x + i), load_floats(other + i), load_floats(cos + i), load_floats(sin + i)));
  }
  if (i < size) {
    const int64_t n = size - i;
    store_some(output + i,
               term(load_some(x + i, n), load_some(other + i, n), load_some(cos + i, n), load_some(sin + i, n)), n);
  }
}

template <typename Element>
SYNCR1_INLINE void rope_row(const Element* x, int64_t stride, const Element* cos, const Element* sin, Element* output,
                            int64_t num_heads, int64_t width) {
  const int64_t low = width / 2, high = width - low;  // rotate_half(x) = cat(-x[low:], x[:low])
  for (int64_t head = 0; head < num_heads; ++head, x += stride, output += width) {
    rotate(x, x + low, -1.0f, cos, sin, output, high);
    rotate(x + high, x, 1.0f, cos + high, sin + high, output + high, low);
  }
}

void rms_norm(const void* x, const void* weight, void* output, int64_t width, double eps, bool bfloat16) {
  if (bfloat16) {
    norm_row((const uint16_t*)x, (const uint16_t*)weight, (uint16_t*)output, width, eps);
  } else {
    norm_row((const float*)x, (const float*)weight, (float*)output, width, eps);
  }
}

void silu_mul(const void* gate, const void* up, void* output, int64_t width, bool bfloat16) {
  if (bfloat16) {
    silu_row((const uint16_t*)gate, (const uint16_t*)up, (uint16_t*)output, width);
  } else {
    silu_row((const float*)gate, (const float*)up, (float*)output, width);
  }
}

void rope(const void* x, int64_t stride, const void* cos, const void* sin, void* output, int64_t num_heads,
          int64_t width, bool bfloat16) {
  if (bfloat16) {
    rope_row((const uint16_t*)x, stride, (const uint16_t*)cos, (const uint16_t*)sin, (uint16_t*)output, num_heads,
             width);
  } else {
    rope_row((const float*)x, stride, (const float*)cos, (const float*)sin, (float*)output, num_heads, width);
  }
}

}  // namespace

extern const TrunkKernels trunk_kernels;
const TrunkKernels trunk_kernels = {rms_norm, silu_mul, rope};

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
