// PyTorch's threads, for the passes.
#pragma once

#include "../stable.h"
#include "threads.h"

namespace pglcl {

inline Parallel torch_threads() {
  return {int(torch::stable::get_num_threads()), [](int workers, Parallel::Body body, const void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
              for (int64_t worker = first; worker < last; ++worker) body(context, int(worker));
            });
          }};
}

}  // namespace pglcl
