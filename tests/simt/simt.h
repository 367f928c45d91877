// A SIMT emulator: runs a CUDA-style grid on the CPU, one block at a time, and is stricter than a GPU.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier or a warp operation; the scheduler resumes
// it when all threads that take part have come. On the way every access to memory is checked. A launch throws
// simt::Error, naming kernel, block, thread and source line, on
//   - an access outside of a global buffer or of shared memory, or to a global buffer that was not announced,
//   - a read of shared memory, or of an output buffer, that nobody wrote,
//   - threads of a block at different barriers, or gone while others wait (likewise for the lanes of a warp),
//   - two threads touching one shared address without a barrier between, one of them writing,
//   - a misaligned vector access,
//   - a read of what cp.async has not delivered: its data appears only when the thread that issued it waits.
//
// Kernels are written against the names below, which a small header maps to CUDA when nvcc compiles them (device.h in
// csrc/cuda/kernels). One launch at a time; not thread-safe, and needs none.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

using Location = std::source_location;
using Error = std::runtime_error;

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;

// --- global memory: buffers are announced before a launch
// ----------------------------------------------------------------

class GlobalMemory {
 public:
  // `written` says whether the buffer holds data already; reads of bytes that nobody wrote are errors otherwise.
  void announce(const void* data, size_t bytes, std::string name, bool written) {
    if (bytes) buffers_[address(data)] = {bytes, std::move(name), std::vector<bool>(bytes, written)};
  }
  void clear() { buffers_.clear(); }

  // Empty when the access is fine, else what is wrong with it. `base` is the pointer that the kernel was given: an
  // access that strays from its buffer into another is out of bounds, too.
  std::string check(const void* base, const void* at, size_t bytes, bool write) {
    auto next = buffers_.upper_bound(address(base));
    if (next == buffers_.begin()) return "global access to memory that is no buffer";
    auto& [start, buffer] = *std::prev(next);
    if (address(base) > start + buffer.bytes) return "global access to memory that is no buffer";
    if (address(at) < start || address(at) + bytes > start + buffer.bytes)
      return "out-of-bounds global access: byte " + std::to_string(int64_t(address(at) - start)) + " of " +
             buffer.name + ", which has " + std::to_string(buffer.bytes);
    if (address(at) % bytes) return "misaligned global access of " + std::to_string(bytes) + " bytes in " + buffer.name;
    for (size_t i = address(at) - start; i < address(at) - start + bytes; ++i) {
      if (write)
        buffer.written[i] = true;
      else if (!buffer.written[i])
        return "read of output memory that nobody wrote: " + buffer.name;
    }
    return {};
  }

 private:
  struct Buffer {
    size_t bytes;
    std::string name;
    std::vector<bool> written;
  };
  static uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
  std::map<uintptr_t, Buffer> buffers_;
};

// --- a block of threads
// -----------------------------------------------------------------------------------------------------

enum class Access { kRead, kWrite, kAtomic };

class Block {
 public:
  static Block& current() { return *instance(); }

  Dim3 block_index, block_dim, grid_dim;
  std::string kernel;
  GlobalMemory* global = nullptr;

  void run(const std::function<void()>& body, int threads, size_t shared_bytes) {
    instance() = this;
    body_ = &body;
    shared_.assign(shared_bytes + kStaticShared, 0);
    shadow_.assign(shared_.size(), Shadow{});
    dynamic_bytes_ = shared_bytes;
    static_used_ = 0;
    static_arrays_.clear();
    epoch_ = 0;
    threads_.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Thread& t = threads_[i];
      if (!t.stack) t.stack = std::make_unique<char[]>(kStack);
      t.state = State::kReady;
      t.warp_epoch = 0;
      t.copies.clear();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = &scheduler_;
      makecontext(&t.context, &Block::enter, 0);
    }
    schedule();
  }

  int thread() const { return running_; }

  [[noreturn]] void fail(const std::string& what, const Location& where) const {
    std::string file = where.file_name();
    file = file.substr(file.find_last_of('/') + 1);
    throw Error("kernel " + kernel + ", block (" + std::to_string(block_index.x) + ", " +
                std::to_string(block_index.y) + "), thread " + std::to_string(running_) + ", " + file + ":" +
                std::to_string(where.line()) + ": " + what);
  }

  // --- barriers and warp operations
  void barrier(const Location& where) { wait(State::kAtBarrier, where); }

  // Every lane of `mask` brings a payload; the last one to come runs `combine` on all of them.
  void collective(const char* name, uint32_t mask, void* payload, const std::function<void(void**)>& combine,
                  const Location& where, bool orders_memory = false) {
    const int warp = running_ / kWarp, lane = running_ % kWarp;
    if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in the mask", where);
    Thread& self = threads_[running_];
    self.payload = payload;
    self.operation = name;
    self.mask = mask;
    self.where = where;
    self.state = State::kAtWarp;
    void* payloads[kWarp] = {};
    for (int other = 0; other < kWarp; ++other) {
      if (!(mask >> other & 1)) continue;
      const int index = warp * kWarp + other;
      if (index >= int(threads_.size())) fail(std::string(name) + ": the mask names a lane that does not exist", where);
      const Thread& t = threads_[index];
      const bool here = t.state == State::kAtWarp && t.operation == std::string(name) && t.mask == mask &&
                        t.where.line() == where.line() && t.where.column() == where.column();
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
    const auto key = std::make_pair(std::string(where.file_name()), where.line());
    auto found = static_arrays_.find(key);
    if (found != static_arrays_.end()) return found->second;
    const size_t at = dynamic_bytes_ + static_used_;
    static_used_ += (bytes + 15) / 16 * 16;
    if (static_used_ > kStaticShared) fail("more than 48 KiB of static shared memory", where);
    return static_arrays_[key] = at;
  }

  void touch_shared(size_t at, size_t bytes, size_t limit, Access access, const Location& where) {
    if (at + bytes > limit)
      fail("out-of-bounds shared access: byte " + std::to_string(at) + " of " + std::to_string(limit), where);
    if (at % bytes) fail("misaligned shared access of " + std::to_string(bytes) + " bytes", where);
    for (size_t i = at; i < at + bytes; ++i) {
      Shadow& s = shadow_[i];
      if (access != Access::kWrite) {
        if (s.pending) fail("read of shared memory before cp.async delivered it", where);
        if (!s.written) fail("read of shared memory that nobody wrote", where);
      }
      if (conflicts(s.writer) && !(access == Access::kAtomic && s.writer.atomic)) race(s.writer, "wrote", where);
      if (access != Access::kRead && conflicts(s.reader)) race(s.reader, "read", where);
      if (access == Access::kRead) {
        if (!conflicts(s.reader)) s.reader = now(false);  // one reader of this epoch is kept
      } else {
        s.writer = now(access == Access::kAtomic);
        s.written = true;
      }
    }
  }

  // --- cp.async
  void copy_async(size_t to, size_t limit, const void* base, const void* from, size_t bytes, bool fill_zero,
                  const Location& where) {
    if (!fill_zero) {
      const std::string wrong = global->check(base, from, bytes, false);
      if (!wrong.empty()) fail(wrong, where);
    }
    touch_shared(to, bytes, limit, Access::kWrite, where);
    for (size_t i = to; i < to + bytes; ++i) {
      shadow_[i].written = false;
      shadow_[i].pending = true;
    }
    threads_[running_].copies.push_back({to, from, bytes, fill_zero, false});
  }
  void commit_copies() { threads_[running_].copies.push_back({0, nullptr, 0, false, true}); }
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
  static constexpr size_t kStaticShared = 48 * 1024;

  enum class State { kReady, kAtBarrier, kAtWarp, kDone };

  struct Touch {
    int thread = -1;
    uint32_t epoch = 0, warp_epoch = 0;
    bool atomic = false;
  };
  struct Shadow {
    Touch writer, reader;
    bool written = false, pending = false;
  };
  struct Copy {
    size_t to;
    const void* from;
    size_t bytes;
    bool fill_zero, ends_group;
  };
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::kDone;
    Location where;
    std::string operation;
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
    } catch (const Error& error) {
      block.error_ = error.what();
    }
    block.threads_[block.running_].state = State::kDone;
  }

  void yield() { swapcontext(&threads_[running_].context, &scheduler_); }

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
        swapcontext(&scheduler_, &threads_[i].context);
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
        fail(t.operation + ": waits for lanes of its warp that are elsewhere or gone", t.where);
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

  Touch now(bool atomic) const { return {running_, epoch_, threads_[running_].warp_epoch, atomic}; }

  // Whether an earlier touch is by another thread with no barrier since.
  bool conflicts(const Touch& earlier) const {
    if (earlier.thread < 0 || earlier.thread == running_ || earlier.epoch != epoch_) return false;
    const bool same_warp = earlier.thread / kWarp == running_ / kWarp;
    return !(same_warp && earlier.warp_epoch < threads_[running_].warp_epoch);
  }

  [[noreturn]] void race(const Touch& earlier, const char* did, const Location& where) const {
    fail("race on a shared address: thread " + std::to_string(earlier.thread) + " " + did +
             " it with no barrier between",
         where);
  }

  void deliver(const Copy& copy) {
    if (copy.fill_zero)
      std::memset(shared_.data() + copy.to, 0, copy.bytes);
    else
      std::memcpy(shared_.data() + copy.to, copy.from, copy.bytes);
    for (size_t i = copy.to; i < copy.to + copy.bytes; ++i) {
      shadow_[i].pending = false;
      shadow_[i].written = true;
      shadow_[i].writer = now(false);
    }
  }

  ucontext_t scheduler_;
  std::vector<Thread> threads_;
  const std::function<void()>* body_ = nullptr;
  std::string error_;
  int running_ = 0;
  uint32_t epoch_ = 0;
  std::vector<unsigned char> shared_;
  std::vector<Shadow> shadow_;
  size_t dynamic_bytes_ = 0, static_used_ = 0;
  std::map<std::pair<std::string, unsigned>, size_t> static_arrays_;
};

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

// Runs `body` as every thread of every block.
inline void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  static Block machine;
  machine.kernel = kernel;
  machine.global = &global_memory();
  machine.block_dim = block;
  machine.grid_dim = grid;
  for (int y = 0; y < grid.y; ++y)
    for (int x = 0; x < grid.x; ++x) {
      machine.block_index = {x, y, 0};
      machine.run(body, block.x * block.y * block.z, shared_bytes);
    }
}

// --- what kernels see
// ----------------------------------------------------------------------------------------------------------

inline int thread_index() { return Block::current().thread(); }
inline int block_index() { return Block::current().block_index.x; }
inline int block_index_y() { return Block::current().block_index.y; }
inline int block_threads() { return Block::current().block_dim.x; }
inline int grid_blocks_y() { return Block::current().grid_dim.y; }

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
    check(data_ + i, sizeof(T), false, where);
    return data_[i];
  }
  void store(int64_t i, Value value, Location where = Location::current()) const {
    check(data_ + i, sizeof(T), true, where);
    const_cast<Value*>(data_)[i] = value;
  }
  template <int kCount>
  Vector<Value, kCount> load_vector(int64_t i, Location where = Location::current()) const {
    check(data_ + i, sizeof(T) * kCount, false, where);
    Vector<Value, kCount> result;
    std::memcpy(&result, data_ + i, sizeof(result));
    return result;
  }
  template <int kCount>
  void store_vector(int64_t i, const Vector<Value, kCount>& value, Location where = Location::current()) const {
    check(data_ + i, sizeof(T) * kCount, true, where);
    std::memcpy(const_cast<Value*>(data_) + i, &value, sizeof(value));
  }
  T* data() const { return data_; }

 private:
  void check(const void* at, size_t bytes, bool write, const Location& where) const {
    const std::string wrong = Block::current().global->check(data_, at, bytes, write);
    if (!wrong.empty()) Block::current().fail(wrong, where);
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
    static_assert(sizeof(T) == 2);
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
