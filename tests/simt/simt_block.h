// A block: its threads as fibers, barriers and warp operations between them, shared memory and cp.async.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "simt_global.h"

namespace simt {

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

}  // namespace simt
