// An interface to threads, so that the passes do not depend on a library of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pglcl {

// The share [first, last) of `count` items that one of `workers` gets.
struct Share {
  int64_t first, last;
  Share(int64_t count, int workers, int worker)
      : first(count * worker / workers), last(count * (worker + 1) / workers) {}
};

struct Parallel {
  using Body = void (*)(const void* context, int worker);

  int threads;
  // Calls body(context, 0) ... body(context, workers - 1), if possible at the same time. Any order is correct, also one
  // after the other.
  void (*call)(int workers, Body body, const void* context);

  // Calls body(worker) for each worker.
  template <typename Function>
  void run(int workers, const Function& body) const {
    if (workers == 1) return body(0);
    call(workers, [](const void* context, int worker) { (*static_cast<const Function*>(context))(worker); }, &body);
  }

  // Calls body(first, last) for equal shares of `count` items. Little work stays in one share, without a second thread.
  template <typename Function>
  void share(int64_t count, bool little_work, const Function& body) const {
    if (count == 0) return;
    const int workers = little_work ? 1 : int(std::min<int64_t>(threads, count));
    run(workers, [&](int worker) {
      const Share part(count, workers, worker);
      body(part.first, part.last);
    });
  }
};

}  // namespace pglcl
