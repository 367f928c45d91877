// The kernels' threads are PyTorch's.
#pragma once

#include <ATen/Parallel.h>

#include "../shared/dtype.h"
#include "threads.h"

namespace pglcl {

inline Parallel torch_threads() {
  return {at::get_num_threads(), [](int workers, const std::function<void(int)>& body) {
            at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
              for (int64_t worker = first; worker < last; ++worker) body(int(worker));
            });
          }};
}

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    default: return DType::kFloat16;
  }
}

}  // namespace pglcl
