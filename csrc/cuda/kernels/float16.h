// Conversion of 16-bit numbers on the device, emulated or not. The CPU takes torch's (csrc/cpu/convert.h), and
// its vectors have their own (csrc/cpu/isa/elements.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "../../shared/host_device.h"

namespace pglcl {

PGLCL_HOST_DEVICE inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // a NaN stays one
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                 // to nearest, ties to even
}

PGLCL_HOST_DEVICE inline float float16_to_float(uint16_t value) {
  // Exponent and mantissa moved into place give the number times 2^-112; the product restores it.
  const uint32_t magnitude = uint32_t(value & 0x7fff) << 13;
  float result;
  std::memcpy(&result, &magnitude, sizeof(result));
  result *= 5.192296858534828e+33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof(bits));
  if ((value & 0x7c00) == 0x7c00) bits = 0x7f800000 | magnitude;  // infinity and NaN
  bits |= uint32_t(value & 0x8000) << 16;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

PGLCL_HOST_DEVICE inline uint16_t float_to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {
    // Subnormal: adding 0.5 lets the hardware round at the right bit.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1) - 0x38000000;
  return uint16_t(sign | (bits >> 13));
}

}  // namespace pglcl
