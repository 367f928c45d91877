// The thin names of csrc/cuda/launch.h for the witness: the ops take the place of the CPU's, on a device that is as old
// as __CUDA_ARCH__ says. Nothing is checked here; the emulator of tests/simt does that.
#pragma once

#include <ATen/core/Tensor.h>

#define PGLCL_CUDA_KEY CPU
#define PGLCL_CHECK_LAUNCH() static_cast<void>(0)

namespace pglcl {

struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor&) {}
};
inline PglclStream current_stream() { return 0; }

enum class DeviceAttribute { kCapabilityMajor, kCapabilityMinor, kSharedBytes, kMultiprocessors };
inline int device_attribute(DeviceAttribute which) {
  switch (which) {
    case DeviceAttribute::kCapabilityMajor: return __CUDA_ARCH__ / 100;
    case DeviceAttribute::kCapabilityMinor: return __CUDA_ARCH__ / 10 % 10;
    case DeviceAttribute::kSharedBytes: return __CUDA_ARCH__ >= 800 ? 163 * 1024 : 64 * 1024;
    default: return 4;
  }
}

template <typename Kernel>
int compiled_for(Kernel) {
  return __CUDA_ARCH__ / 10;
}

inline const void* read_pointer(const at::Tensor& t) { return t.const_data_ptr(); }
inline void* write_pointer(const at::Tensor& t) { return t.mutable_data_ptr(); }

}  // namespace pglcl
