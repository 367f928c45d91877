// The element types of inputs and outputs, and their conversion to the type that sums are kept in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PGLCL_HOST_DEVICE __host__ __device__
#else
#define PGLCL_HOST_DEVICE
#endif

namespace pglcl {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// In bytes.
PGLCL_HOST_DEVICE inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

PGLCL_HOST_DEVICE inline float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

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

// Element `i` of an array of the given type.
template <typename scalar_t>
inline scalar_t read_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return scalar_t(static_cast<const double*>(data)[i]);
    case DType::kFloat32: return scalar_t(static_cast<const float*>(data)[i]);
    case DType::kBFloat16: return scalar_t(bfloat16_to_float(static_cast<const uint16_t*>(data)[i]));
    default: return scalar_t(float16_to_float(static_cast<const uint16_t*>(data)[i]));
  }
}

template <typename scalar_t>
inline void read_elements(const void* data, DType dtype, int64_t first, int64_t count, scalar_t* out) {
  switch (dtype) {
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i) out[i] = scalar_t(static_cast<const double*>(data)[first + i]);
      return;
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i) out[i] = scalar_t(static_cast<const float*>(data)[first + i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = scalar_t(bfloat16_to_float(static_cast<const uint16_t*>(data)[first + i]));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = scalar_t(float16_to_float(static_cast<const uint16_t*>(data)[first + i]));
      return;
  }
}

template <typename scalar_t>
inline void write_elements(const scalar_t* in, int64_t count, void* data, DType dtype, int64_t first) {
  switch (dtype) {
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(data)[first + i] = double(in[i]);
      return;
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(data)[first + i] = float(in[i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(data)[first + i] = float_to_bfloat16(float(in[i]));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(data)[first + i] = float_to_float16(float(in[i]));
      return;
  }
}

}  // namespace pglcl
