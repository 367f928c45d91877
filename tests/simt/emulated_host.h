// The thin names of csrc/cuda/launch.h for the emulated device: its ops take the place of the CPU's, tensors that
// become pointers are announced to the emulator, and what a call must do around its launches is checked.
#pragma once

#include <exception>
#include <string>

#include "simt.h"

#define PGLCL_CUDA_KEY CPU
#define PGLCL_CHECK_LAUNCH() ::simt::check_call()

namespace pglcl {

class DeviceGuard {
 public:
  template <typename Tensor>
  explicit DeviceGuard(const Tensor&) {
    simt::begin_call();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() noexcept(false) {
    const bool forgotten = simt::current_call().unchecked > 0 && std::uncaught_exceptions() == 0;
    simt::end_call();
    if (forgotten) throw simt::Error("the call launches kernels and does not check them");
  }
};

inline PglclStream current_stream() { return simt::kCurrentStream; }

enum class DeviceAttribute { kSharedBytes, kMultiprocessors };
inline int device_attribute(DeviceAttribute which) {
  switch (which) {
    case DeviceAttribute::kSharedBytes: return int(simt::device().shared_bytes);
    default: return simt::device().multiprocessors;
  }
}

template <typename Kernel>
int compiled_for(Kernel) {
  return simt::device().compiled_for;
}

// From the first element to the last, whatever the strides.
template <typename Tensor>
size_t bytes_of(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return 0;
    last += (t.size(d) - 1) * t.stride(d);
  }
  return size_t(last + 1) * t.element_size();
}

// Messages name a tensor by its place among those that the call turns into pointers, from 1.
template <typename Tensor>
const void* read_pointer(const Tensor& t) {
  const void* data = t.const_data_ptr();
  const int number = ++simt::current_call().pointers;
  simt::global_memory().announce(data, bytes_of(t), "pointer " + std::to_string(number) + ", an input", true);
  return data;
}
template <typename Tensor>
void* write_pointer(const Tensor& t) {
  void* data = t.mutable_data_ptr();
  const int number = ++simt::current_call().pointers;
  simt::global_memory().announce(data, bytes_of(t), "pointer " + std::to_string(number) + ", an output", false);
  return data;
}

}  // namespace pglcl
