// The AVX-512 instructions that csrc/cpu/isa names, as plain loops, for processors without them (PGLCL_EMULATE_AVX512
// in CMakeLists.txt). The header stands in the compiler's place on the include path, so that the kernels are compiled
// as they are, with vectors of 64 bytes. Each function does what Intel's manual says, NaN, zeros and subnormal numbers
// included.
#pragma once

#include <stdint.h>

#define PGLCL_EMULATED static inline __attribute__((always_inline))

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef int32_t __m512i __attribute__((vector_size(64), may_alias));
typedef uint16_t __m512bh __attribute__((vector_size(64), may_alias));
typedef uint16_t __m256i __attribute__((vector_size(32), may_alias));  // of the names in use only 16 bits ask for it

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };
enum _MM_MANTISSA_NORM_ENUM { _MM_MANT_NORM_p75_1p5 = 3 };
enum _MM_MANTISSA_SIGN_ENUM { _MM_MANT_SIGN_src = 0 };

namespace emulated {

constexpr int kLanes = 16;

template <typename To, typename From>
PGLCL_EMULATED To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^n for n in [-1000, 1000].
PGLCL_EMULATED double power_of_two(int n) { return bits_as<double>(int64_t(n + 1023) << 52); }

// a 2^n of a whole n, rounded once.
PGLCL_EMULATED float scalef(float a, float n) {
  if (a != a) return a;
  if (n != n) return n;
  if (n == __builtin_inff()) return a * n;  // 0 times infinity is NaN
  if (n == -__builtin_inff()) return __builtin_isinf(a) ? __builtin_nanf("") : __builtin_copysignf(0, a);
  const int least = 600;  // beyond it every float becomes 0 or infinity
  const int power = n > least ? least : n < -least ? -least : int(__builtin_floorf(n));
  return float(double(a) * power_of_two(power));
}

// floor(log2 |x|) as a float. In a double no float is subnormal.
PGLCL_EMULATED float getexp(float x) {
  if (x != x) return x;
  if (x == 0) return -__builtin_inff();
  if (__builtin_isinf(x)) return __builtin_inff();
  return float(int((bits_as<int64_t>(double(x)) >> 52) & 0x7ff) - 1023);
}

// x over a power of two, in [3/4, 3/2), with the sign of x; 1 of 0 and infinity.
PGLCL_EMULATED float getmant(float x) {
  if (x != x) return x;
  if (x == 0 || __builtin_isinf(x)) return __builtin_copysignf(1, x);
  const int64_t bits = bits_as<int64_t>(double(x)), fraction = bits & 0x000fffffffffffff;
  const int64_t exponent = fraction >> 51 ? 1022 : 1023;
  return __builtin_copysignf(float(bits_as<double>(exponent << 52 | fraction)), x);
}

// Subnormal numbers are 0 to the bfloat16 product, as inputs and as outputs, whatever the control register says.
PGLCL_EMULATED float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }
PGLCL_EMULATED float of_bfloat16(uint16_t x) { return flushed(bits_as<float>(uint32_t(x) << 16)); }

// To the nearest, ties to even.
PGLCL_EMULATED uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(flushed(x));
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

PGLCL_EMULATED float of_float16(uint16_t x) {
  const int exponent = x >> 10 & 0x1f, fraction = x & 0x3ff;
  if (exponent == 31)
    return bits_as<float>(uint32_t(x & 0x8000) << 16 | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
  const double value = exponent ? (1024 + fraction) * power_of_two(exponent - 25) : fraction * power_of_two(-24);
  return float(x & 0x8000 ? -value : value);
}

// To the nearest, ties to even.
PGLCL_EMULATED uint16_t to_float16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (x != x) return sign | 0x7e00 | (bits >> 13 & 0x3ff);
  const double magnitude = __builtin_fabs(double(x));
  if (magnitude >= 65520) return sign | 0x7c00;
  // Whole numbers of steps of 2^-24 below 2^-13, and of 2^(e - 10) in [2^e, 2^(e + 1)).
  int step = -24;
  while (magnitude >= power_of_two(step + 11)) ++step;
  const int steps = int(__builtin_rint(magnitude * power_of_two(-step)));
  return sign | uint16_t((step + 24) * 1024 + steps);
}

}  // namespace emulated

PGLCL_EMULATED __m512 _mm512_set1_ps(float value) { return value - __m512{}; }
PGLCL_EMULATED __m512i _mm512_set1_epi32(int value) { return value - __m512i{}; }
PGLCL_EMULATED __m512i _mm512_loadu_si512(const void* from) {
  __m512i value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
PGLCL_EMULATED __m512 _mm512_loadu_ps(const void* from) { return (__m512)_mm512_loadu_si512(from); }
PGLCL_EMULATED void _mm512_storeu_si512(void* to, __m512i value) { __builtin_memcpy(to, &value, sizeof(value)); }

// The second where either is NaN, or both are 0.
PGLCL_EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
PGLCL_EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }

// To the nearest whole number, ties to even.
PGLCL_EMULATED __m512 _mm512_roundscale_ps(__m512 x, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  for (int i = 0; i < emulated::kLanes; ++i) x[i] = __builtin_rintf(x[i]);
  return x;
}

PGLCL_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 n) {
  for (int i = 0; i < emulated::kLanes; ++i) a[i] = emulated::scalef(a[i], n[i]);
  return a;
}

PGLCL_EMULATED __m512 _mm512_getexp_ps(__m512 x) {
  for (int i = 0; i < emulated::kLanes; ++i) x[i] = emulated::getexp(x[i]);
  return x;
}

PGLCL_EMULATED __m512 _mm512_getmant_ps(__m512 x, _MM_MANTISSA_NORM_ENUM, _MM_MANTISSA_SIGN_ENUM) {
  for (int i = 0; i < emulated::kLanes; ++i) x[i] = emulated::getmant(x[i]);
  return x;
}

// sum + a1 b1 + a0 b0 of each pair of bfloat16 numbers: two fused multiply-adds, that of the odd ones first.
PGLCL_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < emulated::kLanes; ++i) {
    float lane = emulated::flushed(sum[i]);
    for (int part = 1; part >= 0; --part)
      lane = emulated::flushed(
          __builtin_fmaf(emulated::of_bfloat16(a[2 * i + part]), emulated::of_bfloat16(b[2 * i + part]), lane));
    sum[i] = lane;
  }
  return sum;
}

// The numbers of b, then those of a.
PGLCL_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  __m512bh result;
  for (int i = 0; i < emulated::kLanes; ++i) {
    result[i] = emulated::to_bfloat16(b[i]);
    result[emulated::kLanes + i] = emulated::to_bfloat16(a[i]);
  }
  return result;
}

// The 16-bit numbers of x in the order of the indices.
PGLCL_EMULATED __m512i _mm512_permutexvar_epi16(__m512i indices, __m512i x) {
  const __m512bh from = (__m512bh)x, at = (__m512bh)indices;
  __m512bh result;
  for (int i = 0; i < 2 * emulated::kLanes; ++i) result[i] = from[at[i] % 32];
  return (__m512i)result;
}

PGLCL_EMULATED __m512 _mm512_cvtph_ps(__m256i halves) {
  __m512 x;
  for (int i = 0; i < emulated::kLanes; ++i) x[i] = emulated::of_float16(halves[i]);
  return x;
}

PGLCL_EMULATED __m256i _mm512_cvtps_ph(__m512 x, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  __m256i halves;
  for (int i = 0; i < emulated::kLanes; ++i) halves[i] = emulated::to_float16(x[i]);
  return halves;
}

#undef PGLCL_EMULATED
