// Vector arithmetic for the CPU kernels, on the compiler's own vector extensions.
//
// This header is compiled once per instruction set, each time inside its own namespace, so that no function built for
// AVX-512 can be picked by the linker for a machine without it. For the same reason nothing here, nor in the files
// that include it, uses a standard-library template.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "integer_of.h"

#ifndef PGLCL_ISA
#error "PGLCL_ISA names the instruction set this file is compiled for; CMakeLists.txt sets it"
#endif

#define PGLCL_INLINE inline __attribute__((always_inline))

namespace pglcl::PGLCL_ISA {

// kMicroRows x (2 vectors) accumulators are held in registers by the matrix micro-kernel: 16 of 32 registers with
// AVX-512 and NEON, 12 of 16 with AVX2, 8 where a product needs a register of its own. Two multiply-adds per cycle,
// each 4 cycles long, ask for 8 at least: with just 8, AVX2 reached 65 % of its peak, with 12 it reaches 98 %.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMicroRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMicroRows = 6;
#else
constexpr int kVectorBytes = 16;
#if PGLCL_REGISTERS == 32
constexpr int kMicroRows = 8;
#else
constexpr int kMicroRows = 4;
#endif
#endif

template <typename scalar_t>
struct Simd {
  typedef scalar_t vec __attribute__((vector_size(kVectorBytes)));
  typedef scalar_t vec_unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(scalar_t))));
  typedef integer_t<scalar_t> mask __attribute__((vector_size(kVectorBytes)));
  typedef integer_t<scalar_t> mask_unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(scalar_t))));
  static constexpr int kLanes = kVectorBytes / sizeof(scalar_t);
  static constexpr int kPanel = 2 * kLanes;  // columns of one micro-kernel tile
};

template <typename scalar_t>
using vec_t = typename Simd<scalar_t>::vec;
template <typename scalar_t>
using mask_t = typename Simd<scalar_t>::mask;

template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> load(const scalar_t* p) {
  return *reinterpret_cast<const typename Simd<scalar_t>::vec_unaligned*>(p);
}

template <typename scalar_t>
PGLCL_INLINE void store(scalar_t* p, vec_t<scalar_t> value) {
  *reinterpret_cast<typename Simd<scalar_t>::vec_unaligned*>(p) = value;
}

template <typename scalar_t>
PGLCL_INLINE mask_t<scalar_t> load_integers(const integer_t<scalar_t>* p) {
  return *reinterpret_cast<const typename Simd<scalar_t>::mask_unaligned*>(p);
}

template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> broadcast(scalar_t value) {
  return value - vec_t<scalar_t>{};
}

template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> absolute(vec_t<scalar_t> x) {
  const integer_t<scalar_t> sign = integer_t<scalar_t>(1) << (8 * sizeof(scalar_t) - 1);
  return (vec_t<scalar_t>)((mask_t<scalar_t>)x & ~sign);
}

// `value` where the mask is set, 0 elsewhere, even in place of NaN.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> keep(mask_t<scalar_t> mask, vec_t<scalar_t> value) {
  return mask ? value : vec_t<scalar_t>{};
}

// The larger of a and b; b where either is NaN.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> maximum(vec_t<scalar_t> a, vec_t<scalar_t> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One instruction. The compiler would make a comparison and a blend.
  if constexpr (sizeof(scalar_t) == 4) return (vec_t<scalar_t>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// Rounds a product to its type, so that the compiler does not fuse it with an addition.
template <typename vec>
PGLCL_INLINE vec rounded(vec product) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(product);
#endif
#endif
#if defined(__x86_64__)
  __asm__("" : "+v"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
#error "rounded() needs a barrier for this processor"
#endif
  return product;
}

// Rounded to float32.
PGLCL_INLINE vec_t<float> as_float32(vec_t<float> x) { return x; }
PGLCL_INLINE vec_t<double> as_float32(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = double(float(x[i]));
  return x;
}

template <typename scalar_t>
PGLCL_INLINE scalar_t horizontal_sum(vec_t<scalar_t> x) {
  // A fixed binary tree, the same on every run.
  scalar_t lanes[Simd<scalar_t>::kLanes];
  store(lanes, x);
  for (int width = Simd<scalar_t>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <typename scalar_t>
PGLCL_INLINE scalar_t horizontal_max(vec_t<scalar_t> x) {
  scalar_t lanes[Simd<scalar_t>::kLanes];
  store(lanes, x);
  scalar_t result = lanes[0];
  for (int i = 1; i < Simd<scalar_t>::kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// 2^f on [-1/2, 1/2]: minimax polynomial, relative error 2e-9.
PGLCL_INLINE vec_t<float> exp2_polynomial(vec_t<float> f) {
  vec_t<float> p = broadcast(1.535336189037e-4f);
  p = p * f + 1.339887442230e-3f;
  p = p * f + 9.618437357816e-3f;
  p = p * f + 5.550332471100e-2f;
  p = p * f + 2.402264791363e-1f;
  p = p * f + 6.931472028551e-1f;
  return p * f + 1.0f;
}

#if defined(__AVX512F__)
PGLCL_INLINE vec_t<float> exp2_of_any(vec_t<float> x) {
  const vec_t<float> n = (vec_t<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vec_t<float>)_mm512_scalef_ps((__m512)exp2_polynomial(x - n), (__m512)n);
}

// 2^x for x < 127, but at least the smallest normal float, which is nothing beside the term near 1 in the callers'
// sums. NaN gives NaN.
PGLCL_INLINE vec_t<float> exp2(vec_t<float> x) {
  return exp2_of_any((vec_t<float>)_mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)x));  // x where it is NaN
}

// 2^x for x in [kLeastExponent, 0]; 0 at the lower end. NaN gives NaN.
template <typename scalar_t>
constexpr scalar_t kLeastExponent = sizeof(scalar_t) == 4 ? -256 : -2048;
PGLCL_INLINE vec_t<float> exp2_to_zero(vec_t<float> x) { return exp2_of_any(x); }

// The larger, or the smaller, of x and a limit; NaN stays NaN.
PGLCL_INLINE vec_t<float> clamp_min(vec_t<float> x, float least) {
  return (vec_t<float>)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
}
PGLCL_INLINE vec_t<float> clamp_max(vec_t<float> x, float most) {
  return (vec_t<float>)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
}

// Natural logarithm of x in [1, infinity). NaN gives NaN.
PGLCL_INLINE vec_t<float> log_from_one(vec_t<float> x) {
  // x = 2^e * m with m in [3/4, 3/2).
  const vec_t<float> m = (vec_t<float>)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const vec_t<float> e = (vec_t<float>)_mm512_getexp_ps((__m512)(x * (4.0f / 3.0f)));
  const vec_t<float> f = m - 1.0f;
  // log(1 + f) = f - f^2 / 2 + f^3 p(f), relative error 5e-9.
  vec_t<float> p = broadcast(-4.5074807170e-2f);
  p = p * f + 1.0463022706e-1f;
  p = p * f - 1.3161193550e-1f;
  p = p * f + 1.4478394901e-1f;
  p = p * f - 1.6647312170e-1f;
  p = p * f + 1.9990861232e-1f;
  p = p * f - 2.5000095842e-1f;
  p = p * f + 3.3333449113e-1f;
  p = p * f - 0.5f;
  return f + f * f * p + e * 0.69314718056f;
}
#else
// For x from -127 on. At -127 the power is 0 instead of a subnormal number, since the bits of its exponent are 0.
template <typename scalar_t>
constexpr scalar_t kLeastExponent = sizeof(scalar_t) == 4 ? -127 : -2048;
PGLCL_INLINE vec_t<float> exp2_to_zero(vec_t<float> x) {
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa. Adding 127 makes it
  // the exponent of the power; it is then shifted by 23 bits.
  const float magic = 12582912.0f + 127.0f;
  const vec_t<float> shifted = x + magic;
  const vec_t<float> scale = (vec_t<float>)((mask_t<float>)shifted << 23);
  return exp2_polynomial(x - (shifted - magic)) * scale;
}
PGLCL_INLINE vec_t<float> exp2(vec_t<float> x) { return exp2_to_zero(maximum<float>(broadcast(-126.0f), x)); }
PGLCL_INLINE vec_t<float> clamp_min(vec_t<float> x, float least) { return maximum<float>(broadcast(least), x); }
PGLCL_INLINE vec_t<float> clamp_max(vec_t<float> x, float most) {
#if defined(__AVX2__)
  return (vec_t<float>)_mm256_min_ps(_mm256_set1_ps(most), (__m256)x);
#else
  return x > most ? broadcast(most) : x;
#endif
}
#endif

PGLCL_INLINE vec_t<double> exp2(vec_t<double> x) {
  vec_t<double> result = x;
  for (int i = 0; i < Simd<double>::kLanes; ++i) result[i] = __builtin_exp2(x[i]);
  return result;
}

// Natural logarithm of a normal, finite x > 0 by its bits. NaN gives a number.
PGLCL_INLINE vec_t<float> log_of_normal(vec_t<float> x) {
  mask_t<float> bits = (mask_t<float>)x;
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  mask_t<float> exponent = (bits - 0x3f3504f3) >> 23;
  vec_t<float> m = (vec_t<float>)(bits - (exponent << 23));
  vec_t<float> e = __builtin_convertvector(exponent, vec_t<float>);
  const vec_t<float> f = m - 1.0f;
  vec_t<float> p = broadcast(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vec_t<float> f2 = f * f;
  return f * f2 * p - 0.5f * f2 + f + e * 0.69314718056f;
}

#if !defined(__AVX512F__)
// Natural logarithm of x in [1, infinity). NaN gives a number, but callers also compute 1 / x, which is then NaN.
PGLCL_INLINE vec_t<float> log_from_one(vec_t<float> x) { return log_of_normal(x); }
#endif

// Natural logarithm of any x > 0. NaN gives NaN.
PGLCL_INLINE vec_t<float> log(vec_t<float> x) {
  const mask_t<float> subnormal = x < 1.17549435e-38f;
  const vec_t<float> result = log_of_normal(subnormal ? x * 33554432.0f : x);  // 2^25
  // The bit operations turn NaN and infinity into numbers, so these are put back.
  return subnormal ? result - 17.3286795f : x - x == 0.0f ? result : x;
}

PGLCL_INLINE vec_t<double> exp2_to_zero(vec_t<double> x) { return exp2(x); }
PGLCL_INLINE vec_t<double> clamp_min(vec_t<double> x, double least) { return x < least ? broadcast(least) : x; }
PGLCL_INLINE vec_t<double> clamp_max(vec_t<double> x, double most) { return x > most ? broadcast(most) : x; }

PGLCL_INLINE vec_t<double> log(vec_t<double> x) {
  vec_t<double> result = x;
  for (int i = 0; i < Simd<double>::kLanes; ++i) result[i] = __builtin_log(x[i]);
  return result;
}

PGLCL_INLINE vec_t<double> log_from_one(vec_t<double> x) { return log(x); }

// e^x for x <= 0; 0 at minus infinity. An x above 0, from rounding or of a pair that does not count, gives 1.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> exp_of_nonpositive(vec_t<scalar_t> x) {
  return exp2_to_zero(clamp_min(clamp_max(x, scalar_t(0)) * scalar_t(1.4426950408889634), kLeastExponent<scalar_t>));
}

}  // namespace pglcl::PGLCL_ISA
