// What every CUDA implementation needs around its kernels: device guard, current stream, launch check, device
// attributes, and the pointers of tensors. Under nvcc they come from CUDA and from PyTorch's stable interface. Any
// other compiler builds the same files for the emulated device of tests/simt, which gives the same names in
// emulated_host.h.
#pragma once

#include "../stable.h"
#include "kernels/device.h"

#if defined(__CUDACC__)

#include <torch/csrc/stable/accelerator.h>

// The dispatch key that the files here register their ops for.
#define PGLCL_CUDA_KEY CUDA

// At the end of each op, after its last launch.
#define PGLCL_CHECK_LAUNCH() ::pglcl::check_cuda(cudaGetLastError(), "launch of a kernel")

namespace pglcl {

// The first line of every op: what follows runs on the device of `t`.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  return device;
}

inline PglclStream current_stream() {
  return static_cast<PglclStream>(torch::stable::accelerator::getCurrentStream(current_device()).nativeHandle());
}

enum class DeviceAttribute : int {
  kSharedBytes = cudaDevAttrMaxSharedMemoryPerBlockOptin,  // the most that a block can ask for
  kMultiprocessors = cudaDevAttrMultiProcessorCount,
};

// An attribute of the current device.
inline int device_attribute(DeviceAttribute which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, cudaDeviceAttr(which), current_device()), "an attribute of the device");
  return value;
}

// The compute capability that the code of a kernel was compiled for, for example 80. If PTX was translated for a newer
// device, it is that of the PTX: what the code may use depends on it, not on the device.
template <typename Kernel>
int compiled_for(Kernel kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
  return attributes.ptxVersion;
}

// A tensor's pointer that kernels read or write; the emulated device checks every access against it.
inline const void* read_pointer(const Tensor& t) { return t.const_data_ptr(); }
inline void* write_pointer(const Tensor& t) { return t.mutable_data_ptr(); }

}  // namespace pglcl

#else
#include "emulated_host.h"
#endif

namespace pglcl {

// Calls body.operator()<T>() with the kernels' element type of a tensor.
template <typename Body>
void with_element_type(const Tensor& t, Body body) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    default: return body.template operator()<Float16>();
  }
}

template <typename T>
const T* input_of(const Tensor& t) {
  return static_cast<const T*>(read_pointer(t));
}

template <typename T>
const T* input_of(const std::optional<Tensor>& t) {
  return t ? input_of<T>(*t) : nullptr;
}

template <typename T>
T* output_of(const Tensor& t) {
  return static_cast<T*>(write_pointer(t));
}

}  // namespace pglcl
