// Checked global memory. Its buffers are announced before a launch.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "simt_touches.h"

namespace simt {

class GlobalMemory {
 public:
  // An input holds data and may not be written; of an output, bytes that nobody wrote may not be read.
  void announce(const void* data, size_t bytes, std::string name, bool input) {
    if (bytes == 0) return;
    const auto found = buffers_.find(address(data));
    if (found != buffers_.end() && found->second.bytes >= bytes && found->second.input == input) return;  // again
    if (found != buffers_.end() && !found->second.input) return;  // an output of this call is read by its next launch
    buffers_[address(data)] = {bytes, std::move(name), input, std::vector<History>(input ? 0 : bytes)};
    last_ = nullptr;
  }
  void clear() {
    buffers_.clear();
    last_ = nullptr;
  }
  // A launch is over: what comes is ordered behind it.
  void forget_touches() {
    for (auto& [start, buffer] : buffers_)
      for (History& h : buffer.history) h.writer = h.readers[0] = h.readers[1] = Touch{};
  }
  // Names an output with a byte that nobody wrote; empty when there is none.
  std::string unwritten() const {
    for (const auto& [start, buffer] : buffers_)
      for (size_t i = 0; i < buffer.history.size(); ++i)
        if (!buffer.history[i].written)
          return "output memory that nobody wrote: byte " + std::to_string(i) + " of " + buffer.name + ", which has " +
                 std::to_string(buffer.bytes);
    return {};
  }

  // Empty when the access is fine, else what is wrong with it. `base` is the pointer that the kernel was given: an
  // access that strays from its buffer into another is out of bounds, too.
  std::string check(const void* base, const void* at, size_t bytes, Access access, const Touch& now) {
    Buffer* found = find(address(base));
    if (!found) return "global access to memory that is no buffer";
    Buffer& buffer = *found;
    const uintptr_t start = last_start_;
    if (address(at) < start || address(at) + bytes > start + buffer.bytes)
      return "out-of-bounds global access: byte " + std::to_string(int64_t(address(at) - start)) + " of " +
             buffer.name + ", which has " + std::to_string(buffer.bytes);
    if (address(at) % bytes) return "misaligned global access of " + std::to_string(bytes) + " bytes in " + buffer.name;
    if (buffer.input) return access == Access::kRead ? std::string() : "write to an input: " + buffer.name;
    for (size_t i = address(at) - start; i < address(at) - start + bytes; ++i) {
      History& h = buffer.history[i];
      if (access != Access::kWrite && !h.written) return "read of output memory that nobody wrote: " + buffer.name;
      if (const Touch* other = h.conflict(now, access))
        return "race in global memory, " + buffer.name + ": " +
               (other->block == now.block ? "thread " + std::to_string(other->thread) : std::string("another block")) +
               " touched it with no barrier between";
      access == Access::kRead ? h.read(now) : h.write(now);
    }
    return {};
  }

 private:
  struct Buffer {
    size_t bytes;
    std::string name;
    bool input;
    std::vector<History> history;  // of each byte; inputs need none
  };
  static uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
  Buffer* find(uintptr_t base) {
    if (last_ && base >= last_start_ && base < last_start_ + last_->bytes)
      return last_;  // another may begin at its end
    auto next = buffers_.upper_bound(base);
    if (next == buffers_.begin()) return nullptr;
    auto& [start, buffer] = *std::prev(next);
    if (base > start + buffer.bytes) return nullptr;
    last_start_ = start;
    last_ = &buffer;
    return last_;
  }
  std::map<uintptr_t, Buffer> buffers_;
  Buffer* last_ = nullptr;
  uintptr_t last_start_ = 0;
};

}  // namespace simt
