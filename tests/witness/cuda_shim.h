// The CUDA language in plain C++: a std::thread for each CUDA thread, a std::barrier for __syncthreads and __syncwarp,
// shared memory that is NaN until it is written. It shares no code with the emulator of tests/simt, and
// ThreadSanitizer, not a rule of ours, finds the races.
//
// What shuffles, votes and tensor cores exchange passes by ThreadSanitizer unseen: on a GPU they put no order into the
// accesses to memory around them, and so they must not do so here.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ WITNESS_ARCHITECTURE  // of the command line
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using cudaStream_t = int;

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace witness {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "witness: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what.c_str());
  std::_Exit(3);
}

// The barrier that this run leaves out; -1: none.
inline int& removed() {
  static int number = -1;
  return number;
}
inline bool kept(int barrier) { return barrier != removed(); }

constexpr int kWarpSize = 32;
constexpr int kNaN = 0xff;  // four or eight bytes of it are a NaN

// A barrier of a warp that ThreadSanitizer does not see: it watches neither these functions nor the system call.
class HiddenBarrier {
 public:
  __attribute__((no_sanitize("thread"), noinline)) void wait() {
    const int before = __atomic_load_n(&passed_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == kWarpSize) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&passed_, before + 1, __ATOMIC_RELEASE);
      syscall(SYS_futex, &passed_, FUTEX_WAKE_PRIVATE, kWarpSize, nullptr, nullptr, 0);
      return;
    }
    while (__atomic_load_n(&passed_, __ATOMIC_ACQUIRE) == before)
      syscall(SYS_futex, &passed_, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
  }

 private:
  int arrived_ = 0, passed_ = 0;
};

// Two sets of words take turns: who writes to one has passed the barrier behind which all had read it.
struct Warp {
  std::optional<std::barrier<>> barrier;
  HiddenBarrier hidden;
  uint64_t words[2][kWarpSize][6];
};
inline thread_local int turn = 0;

// What the threads of one block share.
struct Block {
  std::optional<std::barrier<>> barrier;
  std::vector<Warp> warps;
  std::vector<uint4> dynamic;  // 16-byte aligned
  size_t dynamic_bytes = 0;
};
inline Block*& current_block() {
  static Block* block = nullptr;
  return block;
}
inline Warp& current_warp() { return current_block()->warps[threadIdx.x / kWarpSize]; }

struct StaticArray {
  void* data;
  size_t bytes;
};
inline std::mutex& static_mutex() {
  static std::mutex mutex;
  return mutex;
}
inline std::vector<StaticArray>& static_arrays() {
  static std::vector<StaticArray> arrays;
  return arrays;
}

// One array for each place in the source and each instantiation: the type of `Place` tells them apart.
template <typename T, int kCount, typename Place>
T (&static_shared(Place))
[kCount] {
  static struct Storage {
    T at[kCount];
    Storage() {
      std::memset(static_cast<void*>(at), kNaN, sizeof(at));
      const std::lock_guard<std::mutex> lock(static_mutex());
      static_arrays().push_back({at, sizeof(at)});
    }
  } storage;
  return storage.at;
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(current_block()->dynamic.data());
}

// --- asynchronous copies: wrong data from the copy until its thread waits -----------------------------------------

// Numbers near 48, or 3 in float16. What is not a number the kernels notice themselves, and do such anchors again in
// float64: that would hide a wait that is left out.
constexpr int kPending = 0x42;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, filled;  // of 16; the rest is zeros
  bool ends_group;
};
inline thread_local std::vector<Copy> copies;

inline void wait_for_copies(int left) {
  int groups = 0;
  for (const Copy& c : copies) groups += c.ends_group;
  while (groups > left) {
    const Copy c = copies.front();
    copies.erase(copies.begin());
    if (c.ends_group) {
      --groups;
      continue;
    }
    std::memset(c.to, 0, size_t(c.bytes));
    std::memcpy(c.to, c.from, size_t(c.filled));
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

template <typename Body>
void launch(dim3 grid, int threads, size_t shared_bytes, Body body) {
  Block block;
  current_block() = &block;
  block.warps = std::vector<Warp>(size_t(threads) / kWarpSize);
  block.dynamic_bytes = shared_bytes;
  const auto prepare = [&] {
    block.barrier.emplace(threads);
    for (Warp& warp : block.warps) warp.barrier.emplace(kWarpSize);
    block.dynamic.assign((shared_bytes + 15) / 16, {~0u, ~0u, ~0u, ~0u});
    for (const StaticArray& a : static_arrays()) std::memset(a.data, kNaN, a.bytes);
  };
  std::barrier<> between(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      threadIdx = {unsigned(t), 0, 0};
      blockDim = dim3(unsigned(threads));
      gridDim = grid;
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          if (t == 0) prepare();
          between.arrive_and_wait();
          blockIdx = {x, y, 0};
          body();
          for (const Copy& c : copies)
            if (!c.ends_group) fail("the thread ends while a copy is pending");
          copies.clear();
          // Those that stay wait for each other alone.
          current_warp().barrier->arrive_and_drop();
          current_block()->barrier->arrive_and_drop();
          between.arrive_and_wait();
        }
    });
  for (std::thread& thread : pool) thread.join();
}

// Every lane brings kCount words, and gets those of all.
template <int kCount>
__attribute__((no_sanitize("thread"), noinline)) void exchange_words(const uint64_t (&mine)[kCount],
                                                                     uint64_t (&all)[kWarpSize][kCount]) {
  Warp& warp = current_warp();
  turn = 1 - turn;
  for (int i = 0; i < kCount; ++i) warp.words[turn][threadIdx.x % kWarpSize][i] = mine[i];
  warp.hidden.wait();
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < kCount; ++i) all[lane][i] = warp.words[turn][lane][i];
}

// Every lane brings a value; `combine` makes of all 32 what this lane gets.
template <typename T, typename Combine>
T exchange(T value, Combine combine) {
  static_assert(sizeof(T) <= 8);
  uint64_t mine[1] = {}, words[kWarpSize][1];
  std::memcpy(mine, &value, sizeof(T));
  exchange_words(mine, words);
  T all[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(&all[lane], words[lane], sizeof(T));
  return combine(all, int(threadIdx.x % kWarpSize));
}

}  // namespace witness

inline void __syncthreads() { witness::current_block()->barrier->arrive_and_wait(); }
inline void __syncwarp(unsigned = 0xffffffffu) { witness::current_warp().barrier->arrive_and_wait(); }

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) witness::fail("a warp operation of part of the warp");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  whole_warp(mask);
  return witness::exchange(value, [lanes](const T* all, int lane) { return all[(lane ^ lanes) & 31]; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  whole_warp(mask);
  return witness::exchange(value, [from](const T* all, int) { return all[from & 31]; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  whole_warp(mask);
  return witness::exchange(value, [by](const T* all, int lane) { return all[lane + by < 32 ? lane + by : lane]; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  whole_warp(mask);
  return witness::exchange(unsigned(predicate != 0), [](const unsigned* all, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __syncthreads_or(int predicate) {
  static std::atomic<int> any[2];
  static thread_local int phase = 0;
  std::atomic<int>& mine = any[phase ^= 1];
  if (predicate) mine = 1;
  __syncthreads();
  const int result = mine;
  __syncthreads();
  mine = 0;
  return result;
}

template <typename T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void __trap() { witness::fail("trap"); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// An address of shared memory as instructions name it: bytes from the start of the dynamic part.
inline size_t __cvta_generic_to_shared(const void* p) {
  const size_t at = size_t(static_cast<const unsigned char*>(p) - witness::dynamic_shared());
  if (at >= witness::current_block()->dynamic_bytes) witness::fail("an address that is not in dynamic shared memory");
  return at;
}

// --- the few names of the CUDA runtime that launches use -------------------------------------------------------------

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
