// The few names that kernels use of the machine they run on: CUDA under nvcc, otherwise the emulator in tests/simt,
// which has the same names and checks every access.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#define PGLCL_KERNEL __global__ void
#define PGLCL_DEVICE __device__ __forceinline__

namespace pglcl {

PGLCL_DEVICE int thread_index() { return int(threadIdx.x); }
PGLCL_DEVICE int block_index() { return int(blockIdx.x); }
PGLCL_DEVICE int block_index_y() { return int(blockIdx.y); }
PGLCL_DEVICE int block_threads() { return int(blockDim.x); }
PGLCL_DEVICE int grid_blocks() { return int(gridDim.x); }
PGLCL_DEVICE void sync_threads() { __syncthreads(); }
PGLCL_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
PGLCL_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
PGLCL_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// kCount elements moved by one instruction; aligned to their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <typename T>
struct RemoveConst {
  using type = T;
};
template <typename T>
struct RemoveConst<const T> {
  using type = T;
};

template <typename T>
class Global {
 public:
  using Value = typename RemoveConst<T>::type;
  PGLCL_DEVICE Global(T* data) : data_(data) {}
  PGLCL_DEVICE Value load(int64_t i) const { return data_[i]; }
  PGLCL_DEVICE void store(int64_t i, Value value) const { data_[i] = value; }
  template <int kCount>
  PGLCL_DEVICE Vector<Value, kCount> load_vector(int64_t i) const {
    return *reinterpret_cast<const Vector<Value, kCount>*>(data_ + i);
  }
  template <int kCount>
  PGLCL_DEVICE void store_vector(int64_t i, const Vector<Value, kCount>& value) const {
    *reinterpret_cast<Vector<Value, kCount>*>(data_ + i) = value;
  }
  PGLCL_DEVICE T* data() const { return data_; }

 private:
  T* __restrict__ data_;
};

template <typename T>
class Shared {
 public:
  PGLCL_DEVICE explicit Shared(T* data) : data_(data) {}
  PGLCL_DEVICE T load(int i) const { return data_[i]; }
  PGLCL_DEVICE void store(int i, T value) const { data_[i] = value; }
  template <int kCount>
  PGLCL_DEVICE Vector<T, kCount> load_vector(int i) const {
    return *reinterpret_cast<const Vector<T, kCount>*>(data_ + i);
  }
  PGLCL_DEVICE T atomic_add(int i, T value) const { return atomicAdd(data_ + i, value); }

  // 16 bytes from global memory, or zeros; there once the copies are waited for.
  template <typename U>
  PGLCL_DEVICE void copy_async(int i, const Global<U>& from, int64_t j, bool fill_zero) const {
#if __CUDA_ARCH__ >= 800
    const unsigned to = unsigned(__cvta_generic_to_shared(data_ + i));
    const int bytes = fill_zero ? 0 : 16;  // the rest of the 16 is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from.data() + j), "r"(bytes));
#else
    *reinterpret_cast<uint4*>(data_ + i) =
        fill_zero ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(from.data() + j);
#endif
  }

 private:
  T* data_;
};

// Hands out the dynamic shared memory of the launch, 16-byte aligned.
class SharedMemory {
 public:
  template <typename T>
  PGLCL_DEVICE Shared<T> take(int count) {
    extern __shared__ __align__(16) unsigned char pglcl_dynamic_shared[];
    T* data = reinterpret_cast<T*>(pglcl_dynamic_shared + used_);
    used_ = (used_ + count * int(sizeof(T)) + 15) / 16 * 16;
    return Shared<T>(data);
  }

 private:
  int used_ = 0;
};

#define PGLCL_STATIC_SHARED(T, name, count) \
  __shared__ T name##_storage[count];       \
  const Shared<T> name(name##_storage)

PGLCL_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::);
#endif
}
template <int kLeft>
PGLCL_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft));
#endif
}

PGLCL_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
PGLCL_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
PGLCL_DEVICE float exp2_fast(float x) { return exp2f(x); }

// D += A B on the tensor cores of a warp, operands and result as mma.sync lays them out.
PGLCL_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
PGLCL_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
PGLCL_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// Rounded to TF32's 10 bits of mantissa, ties away from zero.
PGLCL_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits = float_bits(x);
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

}  // namespace pglcl

#define PGLCL_LAUNCH(kernel, grid_x, grid_y, threads, shared_bytes, stream, ...) \
  kernel<<<dim3(unsigned(grid_x), unsigned(grid_y)), threads, shared_bytes, stream>>>(__VA_ARGS__)
using PglclStream = cudaStream_t;

// More than 48 KiB of dynamic shared memory has to be asked for, kernel by kernel.
#define PGLCL_ALLOW_SHARED(kernel, bytes) \
  if ((bytes) > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))

#else  // the emulator

#include <cmath>

#include "simt.h"

#define PGLCL_KERNEL inline void
#define PGLCL_DEVICE inline

namespace pglcl {

using simt::ballot;
using simt::block_index;
using simt::block_index_y;
using simt::block_threads;
using simt::commit_copies;
using simt::Global;
using simt::grid_blocks;
using simt::Shared;
using simt::SharedMemory;
using simt::shuffle_xor;
using simt::sync_threads;
using simt::sync_warp;
using simt::thread_index;
using simt::Vector;
using simt::wait_copies;

#define PGLCL_STATIC_SHARED(T, name, count) const simt::Shared<T> name = simt::static_shared<T>(count)

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t x) { return simt::bits_to_float(x); }
inline float exp2_fast(float x) { return std::exp2(x); }

inline float decode_bf16(uint32_t word, int half) { return bits_float(half ? word & 0xffff0000u : word << 16); }
float decode_f16(uint32_t word, int half);
inline float decode_tf32(uint32_t word, int) { return bits_float(word & 0xffffe000u); }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     simt::Location where = simt::Location::current()) {
  simt::mma<16>(d, a, b, decode_bf16, where);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    simt::Location where = simt::Location::current()) {
  simt::mma<16>(d, a, b, decode_f16, where);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     simt::Location where = simt::Location::current()) {
  simt::mma<8>(d, a, b, decode_tf32, where);
}
inline uint32_t to_tf32(float x) { return (float_bits(x) + 0x1000u) & 0xffffe000u; }

}  // namespace pglcl

#define PGLCL_LAUNCH(kernel, grid_x, grid_y, threads, shared_bytes, stream, ...)                   \
  simt::launch(#kernel, {int(grid_x), int(grid_y), 1}, {int(threads), 1, 1}, size_t(shared_bytes), \
               [=] { kernel(__VA_ARGS__); })
using PglclStream = int;
#define PGLCL_ALLOW_SHARED(kernel, bytes)

#endif

#include "../../shared/dtype.h"

namespace pglcl {

// 16-bit floats as the kernels hold them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PGLCL_DEVICE float widen(float x) { return x; }
PGLCL_DEVICE double widen(double x) { return x; }
PGLCL_DEVICE float widen(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
PGLCL_DEVICE float widen(Float16 x) { return float16_to_float(x.bits); }

template <typename T>
PGLCL_DEVICE T narrow(double x) {
  return T(x);
}
template <>
PGLCL_DEVICE BFloat16 narrow<BFloat16>(double x) {
  return {float_to_bfloat16(float(x))};
}
template <>
PGLCL_DEVICE Float16 narrow<Float16>(double x) {
  return {float_to_float16(float(x))};
}

#if !defined(__CUDACC__)
inline float decode_f16(uint32_t word, int half) { return float16_to_float(uint16_t(half ? word >> 16 : word)); }
#endif

// The type that sums over T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T>
PGLCL_DEVICE T warp_sum(T value) {
  for (int lane = 16; lane > 0; lane /= 2) value += shuffle_xor(value, lane);
  return value;
}

}  // namespace pglcl
