// The names of device.h in the emulator of tests/simt, which checks every access.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "float16.h"
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
using simt::grid_blocks_y;
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
inline uint64_t double_bits(double x) { return std::bit_cast<uint64_t>(x); }
inline double bits_double(uint64_t x) { return std::bit_cast<double>(x); }
inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0 : result;  // NaN stays NaN
}
template <typename T>
T multiply_add(T a, T b, T c) {
  return std::fma(a, b, c);
}
template <typename T>
T maximum(T a, T b) {
  return std::fmax(a, b);
}
template <typename T>
T minimum(T a, T b) {
  return std::fmin(a, b);
}
template <typename T>
T absolute(T x) {
  return std::fabs(x);
}
inline int count_bits(uint32_t x) { return std::popcount(x); }
template <typename T>
T log_of_one_and(T x) {
  return std::log1p(x);
}

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
inline uint32_t to_tf32(float x, simt::Location where = simt::Location::current()) {
  simt::Block::current().need(80, "rounding to TF32", where);
  return std::isnan(x) ? 0x7fffe000u : (float_bits(x) + 0x1000u) & 0xffffe000u;
}
uint32_t pack_bf16(float low, float high, simt::Location where = simt::Location::current());
uint32_t pack_f16(float low, float high, simt::Location where = simt::Location::current());

}  // namespace pglcl

#define PGLCL_LAUNCH(kernel, grid_x, grid_y, threads, shared_bytes, stream, ...)                           \
  simt::launch(simt::name_of<(kernel)>(), simt::address_of(kernel), {int64_t(grid_x), int64_t(grid_y), 1}, \
               {int64_t(threads), 1, 1}, size_t(shared_bytes), stream, [=] { kernel(__VA_ARGS__); })
using PglclStream = int;
#define PGLCL_ALLOW_SHARED(kernel, bytes, device_bytes) \
  simt::allow_shared(simt::address_of(kernel), bytes, device_bytes)

namespace pglcl {

inline uint32_t pack_bf16(float low, float high, simt::Location where) {
  simt::Block::current().need(80, "rounding to pairs of 16 bits", where);
  return float_to_bfloat16(low) | uint32_t(float_to_bfloat16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high, simt::Location where) {
  simt::Block::current().need(80, "rounding to pairs of 16 bits", where);
  return float_to_float16(low) | uint32_t(float_to_float16(high)) << 16;
}
inline float decode_f16(uint32_t word, int half) { return float16_to_float(uint16_t(half ? word >> 16 : word)); }

}  // namespace pglcl
