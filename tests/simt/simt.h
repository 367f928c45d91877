// A SIMT emulator: runs a CUDA-style grid on the CPU, one block at a time, and is stricter than a GPU.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier or a warp operation; the scheduler resumes
// it when all threads that take part have come. On the way every access to memory is checked. A launch throws
// simt::Error, naming kernel, block, thread and source line, on
//   - an access outside of a global buffer or of shared memory, to a buffer that was not announced, or a write to an
//     input,
//   - a read of shared memory, or of an output buffer, that nobody wrote; at the end of a call, output that nobody
//   wrote,
//   - threads of a block at different barriers, or gone while others wait (likewise for the lanes of a warp),
//   - two threads touching one shared address without a barrier between, one of them writing; the same in global
//   memory,
//     where no barrier lies between two blocks,
//   - a misaligned vector access,
//   - a read of what cp.async has not delivered: its data appears only when the thread that issued it waits; and a
//   thread
//     that ends while copies are pending,
//   - what the device lacks: shared memory above its limit, or above 48 KiB without being asked for, grids too large,
//     tensor cores and cp.async below compute capability 8.0; and a launch on another stream than the current one.
//
// Kernels are written against the names below, which a small header maps to CUDA when nvcc compiles them (device.h in
// csrc/cuda/kernels). One launch at a time; not thread-safe, and needs none.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace simt {

using Location = std::source_location;
using Error = std::runtime_error;

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;

// The device that is emulated; tests set it.
struct Device {
  int capability = 80;                // e.g. 80
  int compiled_for = 80;              // what the running code was compiled for; not above the capability
  int64_t shared_bytes = 163 * 1024;  // the most that a block can ask for
  int multiprocessors = 4;
};
inline Device& device() {
  static Device device;
  return device;
}

// Which of the faults that tests/mutants planted is on, 0: none; and which of them the running code has come by.
inline int planted_fault = 0;
constexpr int kMostFaults = 4096;
inline unsigned char reached_faults[kMostFaults] = {};
inline bool is_on(int fault) {
  reached_faults[fault] = 1;
  return planted_fault == fault;
}
#define PGLCL_MUTANT(number, original, mutated) (::simt::is_on(number) ? (mutated) : (original))

// --- who touched a byte last, and whether an access conflicts with it
// ---------------------------------------------------------------------

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

// --- global memory: buffers are announced before a launch
// ----------------------------------------------------------------

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

// --- a block of threads
// -----------------------------------------------------------------------------------------------------

class Block {
 public:
  static Block& current() { return *instance(); }

  Dim3 block_index, block_dim, grid_dim;
  std::string kernel;
  GlobalMemory* global = nullptr;

  // allowed: dynamic shared memory that the kernel may have, and the most that it and the static one may be together.
  void run(const std::function<void()>& body, int threads, size_t shared_bytes, size_t allowed, size_t most) {
    instance() = this;
    allowed_dynamic_ = allowed;
    most_shared_ = most;
    body_ = &body;
    shared_.assign(shared_bytes + kStaticShared, 0xff);
    shadow_.assign(shared_.size() / kGranule, History{});
    dynamic_bytes_ = shared_bytes;
    static_used_ = 0;
    static_arrays_.clear();
    epoch_ = 0;
    ++number_;
    threads_.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Thread& t = threads_[i];
      if (!t.stack) t.stack = std::make_unique<char[]>(kStack);
      t.state = State::kReady;
      t.started = false;
      t.warp_epoch = 0;
      t.copies.clear();
    }
    schedule();
  }

  int thread() const { return running_; }
  Touch now(bool atomic = false) const { return {running_, number_, epoch_, threads_[running_].warp_epoch, atomic}; }

  [[noreturn]] void fail(const std::string& what, const Location& where) const {
    std::string file = where.file_name();
    file = file.substr(file.find_last_of('/') + 1);
    throw Error("kernel " + kernel + ", block (" + std::to_string(block_index.x) + ", " +
                std::to_string(block_index.y) + "), thread " + std::to_string(running_) + ", " + file + ":" +
                std::to_string(where.line()) + ": " + what);
  }

  // What the emulated device must have.
  void need(int capability, const char* what, const Location& where) const {
    if (device().compiled_for < capability)
      fail(std::string(what) + " needs compute capability " + std::to_string(capability) + ", the code is of " +
               std::to_string(device().compiled_for),
           where);
  }

  // --- barriers and warp operations
  void barrier(const Location& where) { wait(State::kAtBarrier, where); }

  // Every lane of `mask` brings a payload; the last one to come runs `combine` on all of them.
  template <typename Combine>
  void collective(const char* name, uint32_t mask, void* payload, const Combine& combine, const Location& where,
                  bool orders_memory = false) {
    const int warp = running_ / kWarp, lane = running_ % kWarp;
    if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in the mask", where);
    Thread& self = threads_[running_];
    self.payload = payload;
    self.operation = name;
    self.mask = mask;
    self.where = where;
    self.state = State::kAtWarp;
    void* payloads[kWarp] = {};
    for (int other = kWarp - 1; other >= 0; --other) {  // the last lanes come last
      if (!(mask >> other & 1)) continue;
      const int index = warp * kWarp + other;
      if (index >= int(threads_.size())) fail(std::string(name) + ": the mask names a lane that does not exist", where);
      const Thread& t = threads_[index];
      const bool here = t.state == State::kAtWarp && t.mask == mask && t.where.line() == where.line() &&
                        t.where.column() == where.column() && std::strcmp(t.operation, name) == 0;
      if (!here) {
        yield();
        return;
      }
      payloads[other] = t.payload;
    }
    combine(payloads);
    for (int other = 0; other < kWarp; ++other) {
      if (!(mask >> other & 1)) continue;
      Thread& t = threads_[warp * kWarp + other];
      t.state = State::kReady;
      if (orders_memory) ++t.warp_epoch;
    }
  }

  // --- shared memory
  unsigned char* shared_data() { return shared_.data(); }
  size_t dynamic_bytes() const { return dynamic_bytes_; }

  // The same place for every thread that comes by the same line.
  size_t static_array(size_t bytes, const Location& where) {
    const auto key = std::make_pair(where.line(), where.column());
    auto found = static_arrays_.find(key);
    if (found != static_arrays_.end()) return found->second;
    const size_t at = (dynamic_bytes_ + 15) / 16 * 16 + static_used_;
    static_used_ += (bytes + 15) / 16 * 16;
    if (static_used_ + 16 > kStaticShared) fail("more than 48 KiB of static shared memory", where);
    if (allowed_dynamic_ + static_used_ > most_shared_)
      fail(std::to_string(static_used_) + " bytes of static shared memory beside " + std::to_string(allowed_dynamic_) +
               " of dynamic, of " + std::to_string(most_shared_),
           where);
    return static_arrays_[key] = at;
  }

  void touch_shared(size_t at, size_t bytes, size_t limit, Access access, const Location& where) {
    if (at + bytes > limit)
      fail("out-of-bounds shared access: byte " + std::to_string(at) + " of " + std::to_string(limit), where);
    if (at % bytes) fail("misaligned shared access of " + std::to_string(bytes) + " bytes", where);
    const Touch now_ = now(access == Access::kAtomic);
    for (size_t i = at / kGranule; i < (at + bytes) / kGranule; ++i) {
      History& h = shadow_[i];
      if (access != Access::kWrite) {
        if (h.pending) fail("read of shared memory before cp.async delivered it", where);
        if (!h.written) fail("read of shared memory that nobody wrote", where);
      } else if (h.pending) {
        fail("write to shared memory that cp.async is about to write", where);
      }
      if (const Touch* other = h.conflict(now_, access))
        fail("race on a shared address: thread " + std::to_string(other->thread) +
                 (other == &h.writer ? " wrote" : " read") + " it with no barrier between",
             where);
      access == Access::kRead ? h.read(now_) : h.write(now_);
    }
  }

  // --- cp.async
  void copy_async(size_t to, size_t limit, const void* base, const void* from, size_t bytes, bool fill_zero,
                  const Location& where) {
    if (!fill_zero) {
      const std::string wrong = global->check(base, from, bytes, Access::kRead, now());
      if (!wrong.empty()) fail(wrong, where);
    }
    touch_shared(to, bytes, limit, Access::kWrite, where);
    if (device().compiled_for < 80) {  // a load and a store, there at once for the thread itself
      deliver({to, from, bytes, fill_zero, false});
      return;
    }
    for (size_t i = to / kGranule; i < (to + bytes) / kGranule; ++i) {
      shadow_[i].written = false;
      shadow_[i].pending = true;
    }
    threads_[running_].copies.push_back({to, from, bytes, fill_zero, false});
  }
  void commit_copies() {
    if (device().compiled_for >= 80) threads_[running_].copies.push_back({0, nullptr, 0, false, true});
  }
  // Delivers all but the newest `left` groups of this thread.
  void wait_copies(int left) {
    std::vector<Copy>& copies = threads_[running_].copies;
    int groups = 0;
    for (const Copy& c : copies) groups += c.ends_group;
    size_t done = 0;
    for (int group = 0; group < groups - left; ++group) {
      for (; !copies[done].ends_group; ++done) deliver(copies[done]);
      ++done;
    }
    copies.erase(copies.begin(), copies.begin() + done);
  }

 private:
  static constexpr size_t kStack = 256 * 1024;
  static constexpr size_t kStaticShared = 48 * 1024 + 16;
  static constexpr size_t kGranule = 2;  // bytes that share a history: the smallest element in shared memory

  enum class State { kReady, kAtBarrier, kAtWarp, kDone };

  struct Copy {
    size_t to;
    const void* from;
    size_t bytes;
    bool fill_zero, ends_group;
  };
  struct Thread {
    ucontext_t context;  // to start it; from then on:
    jmp_buf paused;
    std::unique_ptr<char[]> stack;
    State state = State::kDone;
    bool started = false;
    Location where;
    const char* operation = "";
    uint32_t mask = 0;
    void* payload = nullptr;
    uint32_t warp_epoch = 0;
    std::vector<Copy> copies;
  };

  static Block*& instance() {
    static Block* block = nullptr;
    return block;
  }

  static void enter() {
    Block& block = current();
    try {
      (*block.body_)();
      for (const Copy& copy : block.threads_[block.running_].copies)
        if (!copy.ends_group) block.fail("the thread ends while cp.async is under way", Location::current());
    } catch (const std::exception& error) {
      block.error_ = error.what();
    }
    block.threads_[block.running_].state = State::kDone;
    _longjmp(block.scheduler_, 1);
  }

  // Between threads by _setjmp and _longjmp: swapcontext asks the kernel for the signal mask every time.
  void yield() {
    if (_setjmp(threads_[running_].paused) == 0) _longjmp(scheduler_, 1);
  }
  void resume(Thread& t) {
    if (_setjmp(scheduler_) != 0) return;
    if (t.started) _longjmp(t.paused, 1);
    t.started = true;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, &Block::enter, 0);
    setcontext(&t.context);
  }

  void wait(State state, const Location& where) {
    threads_[running_].state = state;
    threads_[running_].where = where;
    yield();
  }

  void schedule() {
    error_.clear();
    for (;;) {
      bool progress = false, alive = false;
      for (size_t i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state != State::kReady) continue;
        running_ = int(i);
        resume(threads_[i]);
        if (!error_.empty()) throw Error(error_);
        progress = true;
      }
      for (const Thread& t : threads_) alive = alive || t.state != State::kDone;
      if (!alive) return;
      if (!progress) release_barrier();
    }
  }

  // Nobody can run: either all threads are at one barrier, or something is wrong.
  void release_barrier() {
    const Thread* first = nullptr;
    for (size_t i = 0; i < threads_.size(); ++i) {
      const Thread& t = threads_[i];
      running_ = int(i);
      if (t.state == State::kAtWarp)
        fail(std::string(t.operation) + ": waits for lanes of its warp that are elsewhere or gone", t.where);
      if (t.state == State::kAtBarrier && !first) first = &t;
    }
    for (size_t i = 0; i < threads_.size(); ++i) {
      const Thread& t = threads_[i];
      running_ = int(i);
      if (t.state == State::kDone)
        fail("thread is gone while others wait at the barrier in line " + std::to_string(first->where.line()),
             first->where);
      if (t.where.line() != first->where.line() || t.where.column() != first->where.column())
        fail("threads of a block at different barriers: lines " + std::to_string(first->where.line()) + " and " +
                 std::to_string(t.where.line()),
             t.where);
    }
    ++epoch_;
    for (Thread& t : threads_) t.state = State::kReady;
  }

  void deliver(const Copy& copy) {
    if (copy.fill_zero)
      std::memset(shared_.data() + copy.to, 0, copy.bytes);
    else
      std::memcpy(shared_.data() + copy.to, copy.from, copy.bytes);
    for (size_t i = copy.to / kGranule; i < (copy.to + copy.bytes) / kGranule; ++i) {
      shadow_[i].pending = false;
      shadow_[i].write(now());
    }
  }

  jmp_buf scheduler_;
  std::vector<Thread> threads_;
  const std::function<void()>* body_ = nullptr;
  std::string error_;
  int running_ = 0;
  uint32_t epoch_ = 0, number_ = 0;
  std::vector<unsigned char> shared_;
  std::vector<History> shadow_;
  size_t dynamic_bytes_ = 0, static_used_ = 0, allowed_dynamic_ = 0, most_shared_ = 0;
  std::map<std::pair<unsigned, unsigned>, size_t> static_arrays_;
};

// --- calls and launches
// -------------------------------------------------------------------------------------------------------

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

// --- what kernels see
// ----------------------------------------------------------------------------------------------------------

inline int thread_index() { return Block::current().thread(); }
inline int block_index() { return int(Block::current().block_index.x); }
inline int block_index_y() { return int(Block::current().block_index.y); }
inline int block_threads() { return int(Block::current().block_dim.x); }
inline int grid_blocks_y() { return int(Block::current().grid_dim.y); }

inline void sync_threads(Location where = Location::current()) { Block::current().barrier(where); }

inline void sync_warp(Location where = Location::current()) {
  Block::current().collective("sync_warp", 0xffffffffu, nullptr, [](void**) {}, where, true);
}

template <typename T>
T shuffle_xor(T value, int lane_mask, Location where = Location::current()) {
  T result = value;
  std::pair<T, T*> mine{value, &result};
  Block::current().collective(
      "shuffle_xor", 0xffffffffu, &mine,
      [lane_mask](void** lanes) {
        for (int i = 0; i < kWarp; ++i)
          *static_cast<std::pair<T, T*>*>(lanes[i])->second =
              static_cast<std::pair<T, T*>*>(lanes[i ^ lane_mask])->first;
      },
      where);
  return result;
}

// A bit per lane: whether its predicate holds.
inline uint32_t ballot(bool predicate, Location where = Location::current()) {
  uint32_t result = 0;
  std::pair<bool, uint32_t*> mine{predicate, &result};
  Block::current().collective(
      "ballot", 0xffffffffu, &mine,
      [](void** lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < kWarp; ++i)
          bits |= uint32_t(static_cast<std::pair<bool, uint32_t*>*>(lanes[i])->first) << i;
        for (int i = 0; i < kWarp; ++i) *static_cast<std::pair<bool, uint32_t*>*>(lanes[i])->second = bits;
      },
      where);
  return result;
}

// kCount elements moved by one instruction; aligned to their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <typename T>
class Global {
 public:
  using Value = std::remove_const_t<T>;
  Global(T* data) : data_(data) {}
  Value load(int64_t i, Location where = Location::current()) const {
    check(data_ + i, sizeof(T), Access::kRead, where);
    return data_[i];
  }
  void store(int64_t i, Value value, Location where = Location::current()) const {
    check(data_ + i, sizeof(T), Access::kWrite, where);
    const_cast<Value*>(data_)[i] = value;
  }
  template <int kCount>
  Vector<Value, kCount> load_vector(int64_t i, Location where = Location::current()) const {
    check(data_ + i, sizeof(T) * kCount, Access::kRead, where);
    Vector<Value, kCount> result;
    std::memcpy(&result, data_ + i, sizeof(result));
    return result;
  }
  template <int kCount>
  void store_vector(int64_t i, const Vector<Value, kCount>& value, Location where = Location::current()) const {
    check(data_ + i, sizeof(T) * kCount, Access::kWrite, where);
    std::memcpy(const_cast<Value*>(data_) + i, &value, sizeof(value));
  }
  T* data() const { return data_; }

 private:
  static void check_at(const void* base, const void* at, size_t bytes, Access access, const Location& where) {
    Block& block = Block::current();
    const std::string wrong = block.global->check(base, at, bytes, access, block.now(access == Access::kAtomic));
    if (!wrong.empty()) block.fail(wrong, where);
  }
  void check(const void* at, size_t bytes, Access access, const Location& where) const {
    check_at(data_, at, bytes, access, where);
  }
  T* data_;
};

template <typename T>
class Shared {
 public:
  Shared(size_t at, size_t count) : at_(at), count_(count) {}
  T load(int64_t i, Location where = Location::current()) const {
    return *static_cast<const T*>(touch(i, sizeof(T), Access::kRead, where));
  }
  void store(int64_t i, T value, Location where = Location::current()) const {
    *static_cast<T*>(touch(i, sizeof(T), Access::kWrite, where)) = value;
  }
  template <int kCount>
  Vector<T, kCount> load_vector(int64_t i, Location where = Location::current()) const {
    Vector<T, kCount> result;
    std::memcpy(&result, touch(i, sizeof(result), Access::kRead, where), sizeof(result));
    return result;
  }
  T atomic_add(int64_t i, T value, Location where = Location::current()) const {
    T* at = static_cast<T*>(touch(i, sizeof(T), Access::kAtomic, where));
    const T before = *at;
    *at += value;
    return before;
  }
  // As ldmatrix has it for four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8.
  void load_matrices(int64_t i, uint32_t (&out)[4], Location where = Location::current()) const {
    matrices(i, out, false, where);
  }
  void load_matrices_transposed(int64_t i, uint32_t (&out)[4], Location where = Location::current()) const {
    static_assert(sizeof(T) == 2);
    matrices(i, out, true, where);
  }
  // 16 bytes from global memory, or zeros; they appear when this thread waits.
  template <typename U>
  void copy_async(int64_t i, const Global<U>& from, int64_t j, bool fill_zero,
                  Location where = Location::current()) const {
    if (i < 0) Block::current().fail("negative index into shared memory", where);
    Block::current().copy_async(at_ + i * sizeof(T), at_ + count_ * sizeof(T), from.data(), from.data() + j, 16,
                                fill_zero, where);
  }

 private:
  void matrices(int64_t i, uint32_t (&out)[4], bool transposed, const Location& where) const {
    Block::current().need(75, "ldmatrix", where);
    struct Payload {
      uint16_t row[8];
      uint32_t* out;
    } mine;
    std::memcpy(mine.row, touch(i, 16, Access::kRead, where), 16);
    mine.out = out;
    Block::current().collective(
        "ldmatrix", 0xffffffffu, &mine,
        [transposed](void** lanes) {
          const auto element = [&](int matrix, int row, int column) {
            return uint32_t(static_cast<Payload*>(lanes[8 * matrix + row])->row[column]);
          };
          for (int lane = 0; lane < kWarp; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
              const int one = lane / 4, two = lane % 4 * 2;
              static_cast<Payload*>(lanes[lane])->out[matrix] =
                  transposed ? element(matrix, two, one) | element(matrix, two + 1, one) << 16
                             : element(matrix, one, two) | element(matrix, one, two + 1) << 16;
            }
        },
        where);
  }
  void* touch(int64_t i, size_t bytes, Access access, const Location& where) const {
    if (i < 0) Block::current().fail("negative index into shared memory", where);
    Block::current().touch_shared(at_ + i * sizeof(T), bytes, at_ + count_ * sizeof(T), access, where);
    return Block::current().shared_data() + at_ + i * sizeof(T);
  }
  size_t at_, count_;
};

// Hands out the dynamic shared memory of the launch, 16-byte aligned, in the same order in every thread.
class SharedMemory {
 public:
  template <typename T>
  Shared<T> take(size_t count, Location where = Location::current()) {
    const size_t at = used_;
    used_ = (used_ + count * sizeof(T) + 15) / 16 * 16;
    if (at + count * sizeof(T) > Block::current().dynamic_bytes())
      Block::current().fail("the launch asked for less shared memory than the kernel takes", where);
    return Shared<T>(at, count);
  }

 private:
  size_t used_ = 0;
};

template <typename T>
Shared<T> static_shared(size_t count, Location where = Location::current()) {
  return Shared<T>(Block::current().static_array(count * sizeof(T), where), count);
}

inline void commit_copies() { Block::current().commit_copies(); }
template <int kLeft>
void wait_copies() {
  Block::current().wait_copies(kLeft);
}

// --- tensor cores: D = A B + C, fragments laid out over the lanes as the PTX ISA has them for mma.sync
// ----------------------------

// Runs one product per warp. decode(fragment word, half) turns a register into the operand's numbers.
template <int kDepth, typename Decode>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode, const Location& where) {
  Block::current().need(80, "mma", where);
  struct Payload {
    const uint32_t *a, *b;
    float* d;
  } mine{a, b, d};
  Block::current().collective(
      "mma", 0xffffffffu, &mine,
      [&](void** lanes) {
        float left[16][kDepth], right[kDepth][8];
        constexpr int kPerWord = kDepth / 8;  // numbers in a 32-bit register: 2 for 16-bit operands, 1 for TF32
        for (int lane = 0; lane < kWarp; ++lane) {
          const Payload& p = *static_cast<Payload*>(lanes[lane]);
          const int group = lane / 4, within = lane % 4;
          for (int word = 0; word < 4; ++word)
            for (int half = 0; half < kPerWord; ++half)
              left[group + 8 * (word % 2)][within * kPerWord + half + 4 * kPerWord * (word / 2)] =
                  decode(p.a[word], half);
          for (int word = 0; word < 2; ++word)
            for (int half = 0; half < kPerWord; ++half)
              right[within * kPerWord + half + 4 * kPerWord * word][group] = decode(p.b[word], half);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          const Payload& p = *static_cast<Payload*>(lanes[lane]);
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            float sum = p.d[i];
            for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
            p.d[i] = sum;
          }
        }
      },
      where);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace simt
