// What every CUDA implementation does around its kernels: device guard, current stream, launch check, device
// attributes, and the pointers of tensors. Under nvcc these are PyTorch's and CUDA's own; any other compiler builds the
// same files for the emulated device of tests/simt, which gives the same names in emulated_host.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/device.h"

#if defined(__CUDACC__)

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

// The dispatch key that the files here register their ops for.
#define PGLCL_CUDA_KEY CUDA

// At the end of each op, after its last launch.
#define PGLCL_CHECK_LAUNCH() C10_CUDA_KERNEL_LAUNCH_CHECK()

namespace pglcl {

// The first line of every op: what follows runs on the device of `t`.
class DeviceGuard {
 public:
  explicit DeviceGuard(const at::Tensor& t) : guard_(t.device()) {}

 private:
  c10::cuda::CUDAGuard guard_;
};

inline PglclStream current_stream() { return c10::cuda::getCurrentCUDAStream(); }

enum class DeviceAttribute : int {
  kCapabilityMajor = cudaDevAttrComputeCapabilityMajor,
  kCapabilityMinor = cudaDevAttrComputeCapabilityMinor,
  kSharedBytes = cudaDevAttrMaxSharedMemoryPerBlockOptin,  // the most that a block can ask for
  kMultiprocessors = cudaDevAttrMultiProcessorCount,
};

// Of the current device.
inline int device_attribute(DeviceAttribute which) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, cudaDeviceAttr(which), c10::cuda::current_device()));
  return value;
}

// The compute capability that the code of a kernel was compiled for, e.g. 80: of its PTX, where that was translated for
// a newer device. What the code may use depends on it, not on the device.
template <typename Kernel>
int compiled_for(Kernel kernel) {
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion;
}

// A tensor's pointer that kernels read or write; the emulated device checks every access against it.
inline const void* read_pointer(const at::Tensor& t) { return t.const_data_ptr(); }
inline void* write_pointer(const at::Tensor& t) { return t.mutable_data_ptr(); }

}  // namespace pglcl

#else
#include "emulated_host.h"
#endif

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

template <typename T>
const T* input_of(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(read_pointer(t)) : nullptr;
}

template <typename T>
T* output_of(at::Tensor& t) {
  return static_cast<T*>(write_pointer(t));
}

}  // namespace pglcl
