// The kernels' threads are PyTorch's.
#pragma once

#include "../stable.h"
#include "threads.h"

namespace pglcl {

inline Parallel torch_threads() {
  return {int(torch::stable::get_num_threads()), [](int workers, const std::function<void(int)>& body) {
            if (workers == 1) return body(0);
            torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
              for (int64_t worker = first; worker < last; ++worker) body(int(worker));
            });
          }};
}

}  // namespace pglcl
