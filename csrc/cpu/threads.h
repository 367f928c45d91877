// How the CPU kernels ask for threads without knowing whose they are.
#pragma once

#include <functional>

namespace pglcl {

struct Parallel {
  int threads;
  // Calls body(0) ... body(workers - 1), concurrently where it can; any order, also one after the other, is correct.
  std::function<void(int workers, const std::function<void(int)>& body)> run;
};

// [first, last) of `count` items for one of `workers`.
struct Share {
  int64_t first, last;
  Share(int64_t count, int workers, int worker)
      : first(count * worker / workers), last(count * (worker + 1) / workers) {}
};

}  // namespace pglcl
