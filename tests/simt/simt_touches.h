// Who touched a byte last, and whether an access conflicts with it.
#pragma once

#include <cstdint>

#include "simt_device.h"

namespace simt {

enum class Access { kRead, kWrite, kAtomic };

struct Touch {
  int thread = -1;
  uint32_t block = 0, epoch = 0, warp_epoch = 0;  // the block's number in all launches; barriers it has passed
  bool atomic = false;

  // Whether this earlier touch is unordered with one by `now`: another thread's, with no barrier since.
  bool unordered(const Touch& now) const {
    if (thread < 0) return false;
    if (block != now.block) return true;  // of the same launch: the end of a launch forgets all touches
    if (thread == now.thread || epoch != now.epoch) return false;
    return !(thread / kWarp == now.thread / kWarp && warp_epoch < now.warp_epoch);
  }
};

// The last writer, and two readers since the last barrier: a third need not be kept, since of two readers one is not
// the writer to come.
struct History {
  Touch writer, readers[2];
  bool written = false, pending = false;

  void read(const Touch& now) {
    int oldest = 0;
    for (int i = 0; i < 2; ++i) {
      Touch& r = readers[i];
      if (!r.unordered(now)) {  // ordered before this read, or this thread's own: it is the new one's to stand for
        r = now;
        return;
      }
      if (r.warp_epoch < readers[oldest].warp_epoch) oldest = i;
    }
    // Readers of two warps, or blocks, where there are such: one of them conflicts with any writer.
    if (readers[0].block == readers[1].block && readers[0].thread / kWarp == readers[1].thread / kWarp)
      readers[oldest] = now;
  }
  // The touch that the access is in conflict with; null when there is none.
  const Touch* conflict(const Touch& now, Access access) const {
    if (writer.unordered(now) && !(access == Access::kAtomic && writer.atomic)) return &writer;
    if (access != Access::kRead)
      for (const Touch& r : readers)
        if (r.unordered(now)) return &r;
    return nullptr;
  }
  void write(const Touch& now) {
    writer = now;
    written = true;
  }
};

}  // namespace simt
