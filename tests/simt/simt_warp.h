// Threads, warps and tensor cores as kernels see them. A product is D = A B + C, with fragments laid out over the lanes
// as the PTX ISA has them for mma.sync.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "simt_block.h"

namespace simt {

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
