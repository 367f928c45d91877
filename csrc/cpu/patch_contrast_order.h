// The order of the patches: those that take part, by label and then by descriptor. Neighbours are then alike, and most
// tiles hold only positives, only negatives, or nothing that counts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"

namespace pglcl {

struct Patch {
  int64_t label;
  uint64_t descriptor;
  int32_t index;
  bool operator<(const Patch& other) const {
    if (label != other.label) return label < other.label;
    if (descriptor != other.descriptor) return descriptor < other.descriptor;
    return index < other.index;
  }
};

// Unsigned integers in the order of finite numbers. The place of NaN does not matter, but is always the same.
inline uint64_t ordered_bits(double value) {
  uint64_t bits;
  value += 0.0;  // -0 becomes 0
  std::memcpy(&bits, &value, sizeof(bits));
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

template <typename scalar_t>
Buffer<Patch> sorted_patches(int64_t count, const int64_t* labels, const scalar_t* descriptors, int64_t channels,
                             int64_t ignore_index, bool sort) {
  Buffer<Patch> patches(count);
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i)
    if (labels[i] != ignore_index)
      patches[taken++] = {labels[i], descriptors ? ordered_bits(double(descriptors[i * channels])) : 0, int32_t(i)};
  patches.shrink(taken);
  if (sort) std::sort(patches.begin(), patches.end());
  return patches;
}

// Replaces any int64 labels by ranks, so that tiles can compare narrow integers.
inline void rank_labels(Buffer<Patch>& a, Buffer<Patch>& b) {
  Buffer<int64_t> distinct(a.size() + b.size());
  int64_t count = 0;
  for (const Buffer<Patch>* side : {&a, &b}) {
    for (const Patch& p : *side)
      if (count == 0 || distinct[count - 1] != p.label) distinct[count++] = p.label;
  }
  distinct.shrink(count);
  std::sort(distinct.begin(), distinct.end());
  int64_t* const end = std::unique(distinct.begin(), distinct.end());
  for (Buffer<Patch>* side : {&a, &b}) {
    int64_t last = 0, rank = -1;
    for (Patch& p : *side) {
      if (rank < 0 || p.label != last) {
        last = p.label;
        rank = std::lower_bound(distinct.data(), end, last) - distinct.data();
      }
      p.label = rank;
    }
  }
}

}  // namespace pglcl
