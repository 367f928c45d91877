// Reads and writes elements of inputs and gradients, of 16 bits or of the computing type, as vectors of that type.
#pragma once

#include "simd.h"

namespace pglcl {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace pglcl

namespace pglcl::PGLCL_ISA {

PGLCL_INLINE vec_t<float> read(const float* p) { return load(p); }
PGLCL_INLINE vec_t<double> read(const double* p) { return load(p); }
PGLCL_INLINE void write(float* p, vec_t<float> x) { store(p, x); }
PGLCL_INLINE void write(double* p, vec_t<double> x) { store(p, x); }

// A vector with 16 bits for each lane of a vector of float.
typedef uint16_t narrow __attribute__((vector_size(Simd<float>::kLanes * 2)));
typedef uint16_t narrow_unaligned __attribute__((vector_size(Simd<float>::kLanes * 2), aligned(2), may_alias));
typedef uint32_t wide __attribute__((vector_size(kVectorBytes)));

// The low halves of the lanes. Compilers would convert lane by lane.
PGLCL_INLINE narrow low_halves(wide x) {
  typedef uint16_t halves __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
  return __builtin_shufflevector((halves)x, (halves)x, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector((halves)x, (halves)x, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector((halves)x, (halves)x, 0, 2, 4, 6);
#endif
}

template <typename element_t>
PGLCL_INLINE narrow load_bits(const element_t* p) {
  return *reinterpret_cast<const narrow_unaligned*>(p);
}
template <typename element_t>
PGLCL_INLINE void store_bits(element_t* p, narrow bits) {
  *reinterpret_cast<narrow_unaligned*>(p) = bits;
}

PGLCL_INLINE vec_t<float> read(const BFloat16* p) {
  return (vec_t<float>)(__builtin_convertvector(load_bits(p), wide) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
PGLCL_INLINE void write(BFloat16* p, vec_t<float> x) {
  const wide bits = (wide)x, rounded_bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const wide quiet = (bits >> 16) | 0x40;
  store_bits(p, low_halves(x == x ? rounded_bits : quiet));
}

#if defined(__AVX512F__)
PGLCL_INLINE vec_t<float> read(const Float16* p) { return (vec_t<float>)_mm512_cvtph_ps((__m256i)load_bits(p)); }
PGLCL_INLINE void write(Float16* p, vec_t<float> x) {
  store_bits(p, (narrow)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
PGLCL_INLINE vec_t<float> read(const Float16* p) { return (vec_t<float>)_mm256_cvtph_ps((__m128i)load_bits(p)); }
PGLCL_INLINE void write(Float16* p, vec_t<float> x) {
  store_bits(p, (narrow)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// As in csrc/cuda/kernels/float16.h.
PGLCL_INLINE vec_t<float> read(const Float16* p) {
  const wide half = __builtin_convertvector(load_bits(p), wide), magnitude = (half & 0x7fff) << 13;
  const vec_t<float> scaled = (vec_t<float>)magnitude * 5.192296858534828e+33f;  // 2^112
  const wide finite = (wide)scaled, special = magnitude | 0x7f800000;
  const wide bits = (half & 0x7c00) == 0x7c00 ? special : finite;
  return (vec_t<float>)(bits | (half & 0x8000) << 16);
}
PGLCL_INLINE void write(Float16* p, vec_t<float> x) {
  const wide sign = ((wide)x >> 16) & 0x8000, bits = (wide)x & 0x7fffffff;
  const vec_t<float> magnitude = (vec_t<float>)bits;
  const wide subnormal = (wide)(magnitude + 0.5f) - 0x3f000000;  // the sum rounds at the right bit
  const wide normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  wide half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x477ff000 ? wide{} + 0x7c00 : half;  // rounds to infinity
  half = bits > 0x7f800000 ? wide{} + 0x7e00 : half;
  store_bits(p, low_halves(sign | half));
}
#endif

}  // namespace pglcl::PGLCL_ISA
