// Several queries against one span of keys and values; compiled once per instruction set, see rows_isa.cpp.
//
// Keys come in tiles, transposed so that lanes are columns and no product is summed over lanes. Every query goes through
// the same operations in the same order however many others are held in registers beside it.
#include "decode_attention.h"

#include <cmath>

#include "vec.h"

namespace syncr1 {
namespace SYNCR1_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // queries in registers: 16 sums of 32 registers
constexpr __mmask16 kAll = 0xffff;  // without a mask GCC 12 warns about its own header
#else
constexpr int kRows = 4;  // 8 sums of 16
#endif

typedef float Quad __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SYNCR1_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SYNCR1_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// Sixteen bytes of each of every fourth column, from `at` on, side by side.
SYNCR1_INLINE Floats load_quads(const char* at, const int64_t* offsets) {
#if defined(__AVX512F__)
  __m512 quads = _mm512_castps128_ps512((__m128)load<Quad>(at + offsets[0]));
  quads = _mm512_maskz_insertf32x4(kAll, quads, (__m128)load<Quad>(at + offsets[4]), 1);
  quads = _mm512_maskz_insertf32x4(kAll, quads, (__m128)load<Quad>(at + offsets[8]), 2);
  return _mm512_maskz_insertf32x4(kAll, quads, (__m128)load<Quad>(at + offsets[12]), 3);
#elif defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load<Quad>(at + offsets[0])),
                              (__m128)load<Quad>(at + offsets[4]), 1);
#else
  return load<Quad>(at + offsets[0]);
#endif
}

// The four words that a lane of 16 bytes holds in each of `words`, as a transposed matrix.
SYNCR1_INLINE void transpose_lanes(Floats words[4]) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_maskz_unpacklo_ps(kAll, words[0], words[1]), ab_high = _mm512_maskz_unpackhi_ps(kAll, words[0], words[1]);
  const __m512 cd = _mm512_maskz_unpacklo_ps(kAll, words[2], words[3]), cd_high = _mm512_maskz_unpackhi_ps(kAll, words[2], words[3]);
  words[0] = _mm512_maskz_shuffle_ps(kAll, ab, cd, 0x44);
  words[1] = _mm512_maskz_shuffle_ps(kAll, ab, cd, 0xee);
  words[2] = _mm512_maskz_shuffle_ps(kAll, ab_high, cd_high, 0x44);
  words[3] = _mm512_maskz_shuffle_ps(kAll, ab_high, cd_high, 0xee);
#elif defined(__AVX2__)
  const __m256 ab = _mm256_unpacklo_ps(words[0], words[1]), ab_high = _mm256_unpackhi_ps(words[0], words[1]);
  const __m256 cd = _mm256_unpacklo_ps(words[2], words[3]), cd_high = _mm256_unpackhi_ps(words[2], words[3]);
  words[0] = _mm256_shuffle_ps(ab, cd, 0x44);
  words[1] = _mm256_shuffle_ps(ab, cd, 0xee);
  words[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
  words[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
#else
  const Floats ab = SYNCR1_SHUFFLE(Ints, words[0], words[1], 0, 4, 1, 5);
  const Floats cd = SYNCR1_SHUFFLE(Ints, words[2], words[3], 0, 4, 1, 5);
  const Floats ab_high = SYNCR1_SHUFFLE(Ints, words[0], words[1], 2, 6, 3, 7);
  const Floats cd_high = SYNCR1_SHUFFLE(Ints, words[2], words[3], 2, 6, 3, 7);
  words[0] = SYNCR1_SHUFFLE(Ints, ab, cd, 0, 1, 4, 5);
  words[1] = SYNCR1_SHUFFLE(Ints, ab, cd, 2, 3, 6, 7);
  words[2] = SYNCR1_SHUFFLE(Ints, ab_high, cd_high, 0, 1, 4, 5);
  words[3] = SYNCR1_SHUFFLE(Ints, ab_high, cd_high, 2, 3, 6, 7);
#endif
}

SYNCR1_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }
SYNCR1_INLINE Floats load_floats(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256((const __m256i*)from)) << 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  return load_bfloat16(from);
#endif
}

SYNCR1_INLINE float load_one(const float* from) { return *from; }
SYNCR1_INLINE float load_one(const uint16_t* from) {
  const uint32_t bits = static_cast<uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One word of each column: one element, or two.
SYNCR1_INLINE void store_words(Floats words, const float*, float* to) { store(to, words); }
SYNCR1_INLINE void store_words(Floats words, const uint16_t*, float* to) {
  store(to, (Words)words << 16);
  store(to + kTileColumns, (Words)words & 0xffff0000u);
}

// Tiles are scored in whole vectors of every set.
SYNCR1_INLINE int64_t whole_columns(int64_t count) { return (count + 15) / 16 * 16; }

// Into the second-level cache: the first holds the tiles at hand.
template <typename Element>
SYNCR1_INLINE void prefetch(const Element* column, int64_t width) {
  for (const char *at = (const char*)column, *end = (const char*)(column + width); at < end; at += 64) {
    __builtin_prefetch(at, 0, 2);
  }
}

// kFloats columns to [width, kTileColumns]; `offsets` are those of the columns, in bytes.
template <typename Element>
SYNCR1_INLINE void transpose_block(const Element* from, const int64_t* offsets, int64_t width, float* to) {
  constexpr int kElements = 16 / sizeof(Element), kPerWord = 4 / sizeof(Element);
  const char* at = reinterpret_cast<const char*>(from);
  int64_t e = 0;
  for (; e + kElements <= width; e += kElements, at += 16) {
    Floats words[4];
    for (int i = 0; i < 4; ++i) words[i] = load_quads(at, offsets + i);
    transpose_lanes(words);
    for (int i = 0; i < 4; ++i) store_words(words[i], from, to + (e + i * kPerWord) * kTileColumns);
  }
  for (; e < width; ++e, at += sizeof(Element)) {
    for (int i = 0; i < kFloats; ++i) {
      to[e * kTileColumns + i] = load_one(reinterpret_cast<const Element*>(at + offsets[i]));
    }
  }
}

// `count` columns to [width, kTileColumns], the last one again until whole_columns(count) are filled. Fetches as many
// columns at `ahead`.
template <typename Element>
__attribute__((noinline)) void transpose(const Element* from, int64_t stride, int64_t count, int64_t width, float* to,
                                         const Element* ahead, int64_t ahead_stride) {
  constexpr int64_t kBytes = sizeof(Element);
  int64_t offsets[kFloats];
  for (int64_t i = 0; i < kFloats; ++i) offsets[i] = i * stride * kBytes;
  for (int64_t column = 0; column < whole_columns(count); column += kFloats) {
    for (int64_t i = column; i < column + kFloats && i < count; ++i) prefetch(ahead + i * ahead_stride, width);
    if (column + kFloats > count) {
      for (int64_t i = 0; i < kFloats; ++i) {
        offsets[i] = ((column + i < count ? column + i : count - 1) - column) * stride * kBytes;
      }
    }
    transpose_block(from + column * stride, offsets, width, to + column);
  }
}

// to [count, padded_width] in float, zeros in the padding.
template <typename Element>
SYNCR1_INLINE void widen_values(const Element* from, int64_t stride, int64_t count, int64_t width, float* to) {
  const int64_t padded = padded_width(width);
  for (int64_t column = 0; column < count; ++column, from += stride, to += padded) {
    int64_t e = 0;
    for (; e + kFloats <= width; e += kFloats) store(to + e, load_floats(from + e));
    for (; e < width; ++e) to[e] = load_one(from + e);
    for (; e < padded; ++e) to[e] = 0.0f;
  }
}

// c [M, NV vectors] (+)= a [M, depth] b [depth, NV vectors].
template <int M, int NV, typename Element>
SYNCR1_INLINE void product_block(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, float* c,
                                 int64_t c_stride, int64_t depth, bool accumulate) {
  Floats sums[M][NV];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < NV; ++v) sums[m][v] = accumulate ? load<Floats>(c + m * c_stride + v * kFloats) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Floats row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load_floats(b + v * kFloats);
    for (int m = 0; m < M; ++m) {
      const Floats factor = broadcast(a[m * a_stride + k]);
      for (int v = 0; v < NV; ++v) sums[m][v] = fma(factor, row[v], sums[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < NV; ++v) store(c + m * c_stride + v * kFloats, sums[m][v]);
  }
}

template <int M, typename Element>
SYNCR1_INLINE void product_rows(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, float* c,
                                int64_t c_stride, int64_t depth, int64_t columns, bool accumulate) {
  constexpr int kVectors = M == kRows ? 2 : 4;
  int64_t i = 0;
  for (; i + kVectors * kFloats <= columns; i += kVectors * kFloats) {
    product_block<M, kVectors>(a, a_stride, b + i, b_stride, c + i, c_stride, depth, accumulate);
  }
  for (; i < columns; i += kFloats) {
    product_block<M, 1>(a, a_stride, b + i, b_stride, c + i, c_stride, depth, accumulate);
  }
}

template <int N>
struct Size {
  static constexpr int value = N;
};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns is a multiple of 16.
template <typename Element>
__attribute__((noinline)) void product(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, float* c,
                                       int64_t c_stride, int64_t rows, int64_t depth, int64_t columns,
                                       bool accumulate) {
  int64_t m = 0;
  const auto at = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    for (; m + kSize <= rows; m += kSize) {
      product_rows<kSize>(a + m * a_stride, a_stride, b, b_stride, c + m * c_stride, c_stride, depth, columns,
                          accumulate);
    }
  };
  at(Size<kRows>{});
  at(Size<kRows / 2>{});
  at(Size<2>{});
  at(Size<1>{});
}

SYNCR1_INLINE float greatest(Floats v) {
#if defined(__AVX512F__)
  v = maximum(v, _mm512_maskz_shuffle_f32x4(kAll, v, v, 0x4e));
  v = maximum(v, _mm512_maskz_shuffle_f32x4(kAll, v, v, 0xb1));
  v = maximum(v, _mm512_maskz_shuffle_ps(kAll, v, v, 0x4e));
  return maximum(v, _mm512_maskz_shuffle_ps(kAll, v, v, 0xb1))[0];
#else
  return largest(v);
#endif
}

// Scores, `count` of which mean something, become their weights, relative to the running maximum.
SYNCR1_INLINE void weigh(float* scores, int64_t count, const Attention& attention, int64_t query) {
  const int64_t columns = whole_columns(count);
  for (int64_t i = count; i < columns; ++i) scores[i] = -INFINITY;
  Floats tops = load<Floats>(scores);
  for (int64_t i = kFloats; i < columns; i += kFloats) tops = maximum(tops, load<Floats>(scores + i));
  const float top = greatest(tops);
  double* const sums = attention.sums + query * kSumLanes;
  if (top > attention.maxima[query]) {
    const Floats factor = exponential(bounded(broadcast(attention.maxima[query] - top)));
    const int64_t padded = padded_width(attention.width);
    float* output = attention.outputs + query * padded;
    for (int64_t e = 0; e < padded; e += kFloats) store(output + e, load<Floats>(output + e) * factor);
    store(sums, load<Doubles>(sums) * broadcast(static_cast<double>(factor[0])));
    attention.maxima[query] = top;
  }
  const Floats base = broadcast(attention.maxima[query]);
  Floats sum = {};
  for (int64_t i = 0; i < columns; i += kFloats) {
    const Floats weight = exponential(bounded(load<Floats>(scores + i) - base));
    store(scores + i, weight);
    sum += weight;
  }
  store(sums, load<Doubles>(sums) + pair_sums(sum));
}

// The keys of the tile that begins at `start`.
template <typename Element>
SYNCR1_INLINE void prefetch_keys(const Span& span, int64_t start, int64_t width) {
  const int64_t end = span.length - start < kTileColumns ? span.length : start + kTileColumns;
  for (int64_t i = start; i < end; ++i) prefetch(static_cast<const Element*>(span.keys) + i * span.key_stride, width);
}

// All queries against one tile.
template <typename Element>
SYNCR1_INLINE void attend_tile(const Attention& attention, const float* keys, const Element* values,
                               int64_t value_stride, int64_t count, float* scores) {
  const int64_t width = attention.width, padded = padded_width(width);
  for (int64_t query = 0; query < attention.num_queries; query += kQueryBlock) {
    const int64_t left = attention.num_queries - query, rows = left < kQueryBlock ? left : kQueryBlock;
    product(attention.queries + query * width, width, keys, kTileColumns, scores, kTileColumns, rows, width,
            whole_columns(count), false);
    for (int64_t i = 0; i < rows; ++i) weigh(scores + i * kTileColumns, count, attention, query + i);
    product(scores, kTileColumns, values, value_stride, attention.outputs + query * padded, padded, rows, count, padded,
            true);
  }
}

template <typename Element>
SYNCR1_INLINE void attend_to(const Span& span, const Span* next, const Attention& attention, float* scratch) {
  const int64_t width = attention.width, padded = padded_width(width);
  const auto *keys = static_cast<const Element*>(span.keys), *values = static_cast<const Element*>(span.values);
  float* const transposed = scratch;
  float* const widened = transposed + kTileColumns * width;
  float* const scores = widened + kTileColumns * padded;
  const bool as_they_are = width == padded && (sizeof(Element) == sizeof(float) || attention.num_queries == 1);
  for (int64_t start = 0; start < span.length; start += kTileColumns) {
    const int64_t left = span.length - start, count = left < kTileColumns ? left : kTileColumns;
    const Element* tile = values + start * span.value_stride;
    transpose(keys + start * span.key_stride, span.key_stride, count, width, transposed, tile, span.value_stride);
    if (left > kTileColumns) {
      prefetch_keys<Element>(span, start + kTileColumns, width);
    } else if (next != nullptr) {
      prefetch_keys<Element>(*next, 0, width);
    }
    if (as_they_are) {
      attend_tile(attention, transposed, tile, span.value_stride, count, scores);
    } else {
      widen_values(tile, span.value_stride, count, width, widened);
      attend_tile<float>(attention, transposed, widened, padded, count, scores);
    }
  }
}

void attend(const Span& span, const Span* next, const Attention& attention, float* scratch) {
  if (span.bfloat16) {
    attend_to<uint16_t>(span, next, attention, scratch);
  } else {
    attend_to<float>(span, next, attention, scratch);
  }
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {attend};

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
