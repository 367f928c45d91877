// Memory as kernels see it: each access names its line and is checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt_block.h"

namespace simt {

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

}  // namespace simt
