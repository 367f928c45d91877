// Copies numbers between a tensor and the type that sums are kept in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace pglcl {

using torch::headeronly::ScalarType;

// Calls `body` with `data` as a pointer to elements of its type.
template <typename Body>
inline void with_elements(const void* data, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body(static_cast<const double*>(data));
    case ScalarType::BFloat16: return body(static_cast<const c10::BFloat16*>(data));
    case ScalarType::Half: return body(static_cast<const c10::Half*>(data));
    default: return body(static_cast<const float*>(data));
  }
}

// Of a floating-point type, in bytes.
inline int64_t size_of(ScalarType dtype) {
  int64_t size = 0;
  with_elements(nullptr, dtype, [&](const auto* typed) { size = sizeof(*typed); });
  return size;
}

// Reads `count` elements of `data` from index `first` on.
template <typename scalar_t>
inline void read_elements(const void* data, ScalarType dtype, int64_t first, int64_t count, scalar_t* out) {
  with_elements(data, dtype, [&](const auto* in) {
    for (int64_t i = 0; i < count; ++i) out[i] = scalar_t(in[first + i]);
  });
}

// Writes `count` elements to `data` from index `first` on. Numbers of 16 bits are rounded to nearest, ties to even.
template <typename scalar_t>
inline void write_elements(const scalar_t* in, int64_t count, void* data, ScalarType dtype, int64_t first) {
  with_elements(data, dtype, [&](const auto* typed) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(*typed)>>;
    T* out = static_cast<T*>(data) + first;
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 2)
        out[i] = T(float(in[i]));
      else
        out[i] = T(in[i]);
    }
  });
}

}  // namespace pglcl
