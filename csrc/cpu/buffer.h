// Memory of one call. A small call takes it from a block that its thread keeps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "huge_pages.h"

namespace pglcl {

// A block per thread. While a Call exists, its buffers are taken from the block; when the Call ends, the block is free
// again. To ask malloc for an op's thirty buffers takes longer than the arithmetic of some dozens of patches, and the
// system would zero the pages of larger buffers each time.
class Arena {
 public:
  // The block grows to the size that a call needed, up to this. The buffers of 4096 patches of 128 numbers take 7 MiB.
  static constexpr int64_t kLargest = int64_t(16) << 20;

  // Buffers of this thread come from its block until the end of the scope, and must not outlive it.
  class Call {
   public:
    Call() : arena_(of_this_thread()), used_(arena_.used_) { ++arena_.calls_; }
    ~Call() {
      arena_.used_ = used_;
      if (--arena_.calls_ == 0) arena_.grow();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    Arena& arena_;
    int64_t used_;
  };

  // Memory on a cache-line boundary; null if the block has no room, or no Call exists.
  static void* take(int64_t bytes) {
    Arena& arena = of_this_thread();
    if (arena.calls_ == 0) return nullptr;
    arena.wanted_ = std::max(arena.wanted_, arena.used_ + bytes + arena.missed_);
    if (arena.used_ + bytes > arena.size_) {
      arena.missed_ += bytes;
      return nullptr;
    }
    void* out = arena.block_ + arena.used_;
    arena.used_ += bytes;
    return out;
  }

 private:
  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  ~Arena() { std::free(block_); }

  // Makes the block large enough for the next call of this kind. A call beyond kLargest gets no block.
  void grow() {
    missed_ = 0;
    const int64_t wanted = std::exchange(wanted_, 0);
    if (wanted <= size_ || wanted > kLargest) return;
    std::free(block_);
    // Whole large pages, since scattered small pages may share the sets of a second-level cache.
    const int64_t page = int64_t(1) << (wanted > (1 << 19) ? 21 : 16);
    size_ = (wanted + page - 1) / page * page;
    block_ = static_cast<char*>(std::aligned_alloc(page, size_));
    if (!block_) size_ = 0;
    advise_huge_pages(block_, size_);
  }

  char* block_ = nullptr;
  int64_t size_ = 0, used_ = 0, wanted_ = 0, missed_ = 0;
  int calls_ = 0;
};

// Uninitialised memory on a cache-line boundary.
template <typename T>
class Buffer {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    if (size == 0) return;
    const int64_t bytes = (size * int64_t(sizeof(T)) + 63) / 64 * 64;
    data_ = static_cast<T*>(Arena::take(bytes));
    if (data_) return;
    owned_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!owned_) throw std::bad_alloc();
    data_ = owned_;
  }
  Buffer(int64_t size, T value) : Buffer(size) { std::fill_n(data_, size, value); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        owned_(std::exchange(other.owned_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(owned_, other.owned_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(owned_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  // Drops the elements after the first `size`.
  void shrink(int64_t size) { size_ = size; }

 private:
  T* data_ = nullptr;
  T* owned_ = nullptr;  // null where the thread's block lends the memory
  int64_t size_ = 0;
};

}  // namespace pglcl
