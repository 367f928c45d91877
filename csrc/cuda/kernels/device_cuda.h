// The names of device.h under nvcc.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#define PGLCL_KERNEL __global__ void
#define PGLCL_DEVICE __device__ __forceinline__

namespace pglcl {

PGLCL_DEVICE int thread_index() { return int(threadIdx.x); }
PGLCL_DEVICE int block_index() { return int(blockIdx.x); }
PGLCL_DEVICE int block_index_y() { return int(blockIdx.y); }
PGLCL_DEVICE int block_threads() { return int(blockDim.x); }
PGLCL_DEVICE int grid_blocks_y() { return int(gridDim.y); }
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

  // Four matrices of 8 rows of 16 bytes. Lane l names row l % 8 of matrix l / 8, aligned to 16 bytes, and gets word l %
  // 4 of row l / 4 in each matrix. Transposed, it gets two neighbours of column l / 4 (ldmatrix in the PTX ISA).
  PGLCL_DEVICE void load_matrices(int i, uint32_t (&out)[4]) const {
    const unsigned from = unsigned(__cvta_generic_to_shared(data_ + i));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
  PGLCL_DEVICE void load_matrices_transposed(int i, uint32_t (&out)[4]) const {
    static_assert(sizeof(T) == 2);
    const unsigned from = unsigned(__cvta_generic_to_shared(data_ + i));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }

  // Copies 16 bytes from global memory, or zeros. They are there after wait_copies.
  template <typename U>
  PGLCL_DEVICE void copy_async(int i, const Global<U>& from, int64_t j, bool fill_zero) const {
#if __CUDA_ARCH__ >= 800
    const unsigned to = unsigned(__cvta_generic_to_shared(data_ + i));
    const int bytes = fill_zero ? 0 : 16;  // the rest of the 16 is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from.data() + j), "r"(bytes)
                 : "memory");
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
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int kLeft>
PGLCL_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
#endif
}

PGLCL_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
PGLCL_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
PGLCL_DEVICE uint64_t double_bits(double x) { return uint64_t(__double_as_longlong(x)); }
PGLCL_DEVICE double bits_double(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }
// 2^x by the special function unit; 0 where the result is below the normal range.
PGLCL_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}
// Rounds once, whatever the compiler's flags: both passes of the loss need the same bits.
PGLCL_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PGLCL_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
// Of a number and NaN, these give the number.
PGLCL_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
PGLCL_DEVICE double maximum(double a, double b) { return fmax(a, b); }
PGLCL_DEVICE float minimum(float a, float b) { return fminf(a, b); }
PGLCL_DEVICE double minimum(double a, double b) { return fmin(a, b); }
PGLCL_DEVICE float absolute(float x) { return fabsf(x); }
PGLCL_DEVICE double absolute(double x) { return fabs(x); }
PGLCL_DEVICE int count_bits(uint32_t x) { return __popc(x); }
PGLCL_DEVICE float log_of_one_and(float x) { return log1pf(x); }
PGLCL_DEVICE double log_of_one_and(double x) { return log1p(x); }

// D += A B on the tensor cores of a warp, operands and result as mma.sync lays them out.
PGLCL_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
PGLCL_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
PGLCL_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// Rounded to TF32's 10 bits of mantissa, ties away from zero.
PGLCL_DEVICE uint32_t to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
#else
  __trap();
  return 0;
#endif
}
// Two numbers rounded to 16 bits each, ties to even.
PGLCL_DEVICE uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  __trap();
  return 0;
#endif
}
PGLCL_DEVICE uint32_t pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  __trap();
  return 0;
#endif
}

}  // namespace pglcl

using PglclStream = cudaStream_t;

namespace pglcl {

// Throws CUDA's message if a call failed. The error is cleared, so that no later launch reports it again.
inline void check_cuda(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(result));
}

// A grid has up to 2^31 - 1 blocks in x and 65535 in y.
inline dim3 checked_grid(int64_t x, int64_t y) {
  if (x > 0x7fffffff || y > 65535)
    throw std::runtime_error("the input needs a grid of " + std::to_string(x) + " x " + std::to_string(y) +
                             " blocks; CUDA has up to 2147483647 x 65535");
  return dim3(unsigned(x), unsigned(y));
}

// A kernel has to ask for more than 48 KiB of dynamic shared memory. It asks for all that the device has, always the
// same, so that host threads that launch it at once do not lower each other's limit. Static shared memory counts
// towards that limit, so a kernel that asks has none.
template <typename Kernel>
void allow_shared(Kernel kernel, int64_t bytes, int64_t device_bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device_bytes)),
             "shared memory of a kernel");
}

}  // namespace pglcl

#define PGLCL_LAUNCH(kernel, grid_x, grid_y, threads, shared_bytes, stream, ...) \
  kernel<<<pglcl::checked_grid(grid_x, grid_y), threads, shared_bytes, stream>>>(__VA_ARGS__)
#define PGLCL_ALLOW_SHARED(kernel, bytes, device_bytes) pglcl::allow_shared(kernel, bytes, device_bytes)
