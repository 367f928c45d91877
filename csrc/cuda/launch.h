// What every CUDA implementation does around its kernels: device guard, current stream, launch check.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/device.h"

namespace pglcl {

// Calls body.operator()<T>() with the kernels' element type of a tensor.
template <typename Body>
void with_element_type(const at::Tensor& t, Body body) {
  switch (t.scalar_type()) {
    case at::kDouble: return body.template operator()<double>();
    case at::kFloat: return body.template operator()<float>();
    case at::kBFloat16: return body.template operator()<BFloat16>();
    default: return body.template operator()<Float16>();
  }
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr which) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, c10::cuda::current_device()));
  return value;
}

template <typename T>
const T* input_of(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}

template <typename T>
T* output_of(at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace pglcl
