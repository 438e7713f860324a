// One native vector of floats and one of doubles, and exp of them. Included by the files that are compiled once per
// instruction set: everything here lives in a namespace of its own set and is inlined, so that no code of a newer
// set can be linked into the path of an older machine.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define SYNCR1_NAMESPACE avx512
#define SYNCR1_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define SYNCR1_NAMESPACE avx2
#define SYNCR1_VECTOR_BYTES 32
#else
#define SYNCR1_NAMESPACE generic
#define SYNCR1_VECTOR_BYTES 16
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define SYNCR1_INLINE static inline __attribute__((always_inline))

namespace syncr1 {
namespace SYNCR1_NAMESPACE {

typedef float Floats __attribute__((vector_size(SYNCR1_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(SYNCR1_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(SYNCR1_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(SYNCR1_VECTOR_BYTES / 2)));
typedef double Doubles __attribute__((vector_size(SYNCR1_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(SYNCR1_VECTOR_BYTES)));
typedef float HalfFloats __attribute__((vector_size(SYNCR1_VECTOR_BYTES / 2)));

constexpr int kFloats = SYNCR1_VECTOR_BYTES / 4;   // lanes of Floats
constexpr int kDoubles = SYNCR1_VECTOR_BYTES / 8;  // lanes of Doubles
constexpr float kLowest = -87.0f;                  // exp of it and below counts as 0: 1e-38
constexpr double kLowestDouble = -708.0;

template <typename Vector, typename Element>
SYNCR1_INLINE Vector load(const Element* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector, typename Element>
SYNCR1_INLINE void store(Element* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

SYNCR1_INLINE Floats broadcast(float x) { return x - Floats{}; }
SYNCR1_INLINE Doubles broadcast(double x) { return x - Doubles{}; }

SYNCR1_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

SYNCR1_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// `value` where the mask's bits are set, 0 elsewhere.
SYNCR1_INLINE Floats where(Ints mask, Floats value) { return (Floats)((Ints)value & mask); }
SYNCR1_INLINE Doubles where(Longs mask, Doubles value) { return (Doubles)((Longs)value & mask); }

// The greater one; b where either is NaN.
SYNCR1_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // the plain one makes GCC 12 warn about its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  const Ints greater = a > b;
  return (Floats)(((Ints)a & greater) | ((Ints)b & ~greater));
#endif
}

SYNCR1_INLINE Doubles maximum(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  const Longs greater = a > b;
  return (Doubles)(((Longs)a & greater) | ((Longs)b & ~greater));
#endif
}

// Lane i where bit i is set, -inf elsewhere.
SYNCR1_INLINE Floats kept(Floats v, uint32_t bits) {
  const Floats nothing = broadcast(-__builtin_inff());
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(nothing, static_cast<__mmask16>(bits), v);
#else
  Ints lane;
  for (int i = 0; i < kFloats; ++i) lane[i] = 1 << i;
  const Ints chosen = (lane & static_cast<int32_t>(bits)) != 0;
  return (Floats)(((Ints)v & chosen) | ((Ints)nothing & ~chosen));
#endif
}

SYNCR1_INLINE float largest(Floats v) {
  for (int width = kFloats / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] = v[i + width] > v[i] ? v[i + width] : v[i];
  }
  return v[0];
}

SYNCR1_INLINE double total(Doubles v) {
  for (int width = kDoubles / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

SYNCR1_INLINE bool any(Longs mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#else
  return (mask[0] | mask[1]) != 0;
#endif
}

SYNCR1_INLINE Doubles widen(const float* from) { return __builtin_convertvector(load<HalfFloats>(from), Doubles); }
// Lane i and lane i + kDoubles, added up.
SYNCR1_INLINE Doubles pair_sums(Floats v) {
  alignas(64) float lanes[kFloats];
  store(lanes, v);
  return widen(lanes) + widen(lanes + kDoubles);
}

SYNCR1_INLINE HalfFloats narrow(Doubles v) { return __builtin_convertvector(v, HalfFloats); }

SYNCR1_INLINE Floats load_bfloat16(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
SYNCR1_INLINE void store_bfloat16(uint16_t* to, Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (Words)(v != v);
  store(to, __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), Halves));
}

// A bound for exp: NaN stays.
SYNCR1_INLINE Floats bounded(Floats x) { return maximum(broadcast(kLowest), x); }

// exp of x in [kLowest, 88) to about 1 ulp (Cephes' polynomial); 0 at kLowest, NaN of NaN.
SYNCR1_INLINE Floats exponential(Floats x) {
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = fma(x, broadcast(1.44269504f), magic);
  const Floats power = shifted - magic;
  const Floats r = fma(power, broadcast(2.12194440e-4f), fma(power, broadcast(-0.693359375f), x));
  Floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
  const Floats scale = (Floats)(((Ints)shifted + 127) << 23);
  return where(~(x <= kLowest), p * scale);
}

SYNCR1_INLINE Doubles bounded(Doubles x) { return maximum(broadcast(kLowestDouble), x); }

// exp of x in [kLowestDouble, 700) to about 1 ulp; 0 at kLowestDouble, NaN of NaN.
SYNCR1_INLINE Doubles exponential(Doubles x) {
  const Doubles magic = broadcast(6755399441055744.0);  // 1.5 * 2^52
  const Doubles shifted = fma(x, broadcast(1.4426950408889634), magic);
  const Doubles power = shifted - magic;
  const Doubles high = fma(power, broadcast(-6.93145751953125e-1), x);
  const Doubles r = fma(power, broadcast(-1.42860682030941723212e-6), high);
  Doubles p = broadcast(1.0 / 6227020800.0);  // Taylor: |r| < 0.35, the first term left out is below 1e-17
  constexpr double kCoefficients[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                      1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,
                                      1.0 / 24.0,        1.0 / 6.0,        0.5,             1.0, 1.0};
  for (double coefficient : kCoefficients) p = fma(p, r, broadcast(coefficient));
  const Doubles scale = (Doubles)(((Longs)shifted + 1023) << 52);
  return where(~(x <= kLowestDouble), p * scale);
}

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
