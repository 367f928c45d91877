// Calls of ops, and their launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "simt_block.h"

namespace simt {

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

// One call of an op, from its device guard to the check of its launches.
struct Call {
  bool open = false;
  int unchecked = 0;                              // launches since the last check
  int pointers = 0;                               // tensors that became pointers
  std::map<const void*, int64_t> allowed_shared;  // what each kernel may use above 48 KiB
};
inline Call& current_call() {
  static Call call;
  return call;
}
// The kernels launched since this was cleared, each with the blocks of its grid in x and y.
inline std::vector<std::string>& launches() {
  static std::vector<std::string> lines;
  return lines;
}

constexpr int kCurrentStream = 7;  // no default: a launch that forgets the stream is seen

// The name of a kernel, without namespaces and template arguments.
template <auto kKernel>
std::string name_of() {
  std::string name = __PRETTY_FUNCTION__;
  name = name.substr(name.find("kKernel = ") + 10);
  name = name.substr(0, name.find_first_of("<(;]"));
  return name.substr(name.find_last_of(": ") + 1);
}
template <typename Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// Every real device gives a block 48 KiB of shared memory; tests that name fewer bytes want other kernels to be chosen.
// More than 48 KiB of dynamic shared memory has to be asked for. What was asked for ends with the call, so that no call
// relies on an earlier one.
inline void allow_shared(const void* kernel, int64_t bytes, int64_t device_bytes) {
  if (bytes <= 48 * 1024) return;
  if (device_bytes > device().shared_bytes)
    throw Error("a kernel asks for " + std::to_string(device_bytes) + " bytes of shared memory, the device has " +
                std::to_string(device().shared_bytes));
  current_call().allowed_shared[kernel] = device_bytes;
}

inline void check_launch(const std::string& kernel, const void* address, Dim3 grid, Dim3 block, size_t shared_bytes,
                         int stream) {
  const auto refuse = [&](const std::string& what) { throw Error("launch of " + kernel + ": " + what); };
  if (!current_call().open) refuse("no device guard");
  if (stream != kCurrentStream) refuse("not on the current stream");
  if (grid.x < 1 || grid.y < 1 || grid.x > 0x7fffffff || grid.y > 65535)
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks");
  if (block.x < 1 || block.x > 1024 || block.x % kWarp) refuse("blocks of " + std::to_string(block.x) + " threads");
  const auto allowed = current_call().allowed_shared.find(address);
  const int64_t limit = std::max<int64_t>(
      48 * 1024, allowed == current_call().allowed_shared.end() ? 0 : std::min(allowed->second, device().shared_bytes));
  if (int64_t(shared_bytes) > limit)
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, of " + std::to_string(limit) + " asked for");
}

// Runs `body` as every thread of every block.
inline void launch(const std::string& name, const void* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, int stream,
                   const std::function<void()>& body) {
  check_launch(name, kernel, grid, block, shared_bytes, stream);
  launches().push_back(name + ' ' + std::to_string(grid.x) + ' ' + std::to_string(grid.y));
  ++current_call().unchecked;
  const auto& asked_for = current_call().allowed_shared;
  const auto asked = asked_for.find(kernel);
  const size_t allowed = asked == asked_for.end() ? shared_bytes : size_t(asked->second);
  const size_t most = asked == asked_for.end() ? 48 * 1024 : size_t(device().shared_bytes);
  static Block machine;
  machine.kernel = name;
  machine.global = &global_memory();
  machine.block_dim = block;
  machine.grid_dim = grid;
  for (int64_t y = 0; y < grid.y; ++y)
    for (int64_t x = 0; x < grid.x; ++x) {
      machine.block_index = {x, y, 0};
      machine.run(body, int(block.x), shared_bytes, allowed, most);
    }
  global_memory().forget_touches();
}

inline void begin_call() {
  current_call() = {};
  current_call().open = true;
  global_memory().clear();
}
// After the last launch of a call: every output must be whole.
inline void check_call() {
  current_call().unchecked = 0;
  const std::string wrong = global_memory().unwritten();
  if (!wrong.empty()) throw Error(wrong);
}
inline void end_call() {
  current_call().open = false;
  global_memory().clear();
}

}  // namespace simt
