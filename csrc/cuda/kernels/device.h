// The few names that kernels use of the device: those of CUDA under nvcc, otherwise those of the emulator in
// tests/simt, which checks every access.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "device_cuda.h"
#else
#include "device_emulated.h"
#endif

#include "../../shared/host_device.h"
#include "float16.h"

namespace pglcl {

// 16-bit floats as the kernels hold them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PGLCL_DEVICE float widen(float x) { return x; }
PGLCL_DEVICE double widen(double x) { return x; }
PGLCL_DEVICE float widen(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
PGLCL_DEVICE float widen(Float16 x) { return float16_to_float(x.bits); }

template <typename T, typename U>
struct SameType {
  static constexpr bool value = false;
};
template <typename T>
struct SameType<T, T> {
  static constexpr bool value = true;
};

// Rounds from the type that sums are kept in.
template <typename T, typename U>
PGLCL_DEVICE T narrow(U x) {
  if constexpr (SameType<T, BFloat16>::value)
    return {float_to_bfloat16(x)};
  else if constexpr (SameType<T, Float16>::value)
    return {float_to_float16(x)};
  else
    return T(x);
}

// The most blocks of a grid in y. If there are more rows, blocks take several.
constexpr int64_t kMostRowsOfBlocks = 65535;

// The type that sums over T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T>
PGLCL_DEVICE T warp_sum(T value) {
  for (int lane = 16; lane > 0; lane /= 2) value += shuffle_xor(value, lane);
  return value;
}

}  // namespace pglcl
