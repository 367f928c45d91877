// The element types of inputs and outputs.
#pragma once

#include <cstdint>

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

}  // namespace pglcl
