// The n-th nearest or farthest of scalar descriptors by binary search, for every device (method, section 4: bounds from
// counts cost a sort).
#pragma once

#include <cmath>

#include "host_device.h"

namespace pglcl {

// The keys that take part, sorted. The members are these keys class by class. Arrays have load(i): memory on the CPU,
// checked memory under the emulator.
template <typename Values, typename Integers>
struct SortedKeys {
  Values value;        // in ascending order
  Integers label;      // of each member
  Integers place;      // of each member in `value`; ascending within a class
  Integers member_of;  // the member that each key of the caller is, -1 when it is ignored
  int64_t total;
};

template <typename Integers>
PGLCL_HOST_DEVICE inline int64_t first_not_below(const Integers& labels, int64_t total, int64_t label) {
  int64_t low = 0, high = total;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (labels.load(middle) < label)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The descriptors that an anchor compares with, ascending: those of its class without its own, or all others.
template <typename Keys>
struct Candidates {
  const Keys& keys;
  int64_t first, own;  // the anchor's class: members [first, first + own)
  int64_t self;        // the member that is the anchor itself, -1 when none is
  bool positives;

  PGLCL_HOST_DEVICE Candidates(const Keys& sorted, int64_t label, int64_t self_key, bool same_class)
      : keys(sorted),
        first(first_not_below(sorted.label, sorted.total, label)),
        own(0),
        self(-1),
        positives(same_class) {
    // Labels may be the largest integer: the end of the class is found without adding to it.
    int64_t low = first, high = sorted.total;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sorted.label.load(middle) == label)
        low = middle + 1;
      else
        high = middle;
    }
    own = low - first;
    if (positives && self_key >= 0) {
      const int64_t member = sorted.member_of.load(self_key);
      if (member >= first && member < low) self = member - first;
    }
  }

  PGLCL_HOST_DEVICE int64_t size() const { return positives ? own - (self >= 0 ? 1 : 0) : keys.total - own; }

  PGLCL_HOST_DEVICE auto at(int64_t q) const {
    if (positives) return keys.value.load(keys.place.load(first + (self >= 0 && q >= self ? q + 1 : q)));
    // The q-th key of another class lies at place q + m, where m members of the own class come before it.
    int64_t low = 0, high = own;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys.place.load(first + middle) - middle <= q)
        low = middle + 1;
      else
        high = middle;
    }
    return keys.value.load(q + low);
  }
};

// The count-th smallest disparity to the candidates (positives) or the count-th largest (negatives); `none` when there
// are not more than `count`.
template <typename scalar_t, typename Keys>
PGLCL_HOST_DEVICE inline scalar_t search_bound(const Keys& keys, int64_t label, scalar_t descriptor, int64_t self_key,
                                               int64_t count, bool positives, scalar_t none) {
  const Candidates<Keys> x(keys, label, self_key, positives);
  const int64_t size = x.size();
  if (size <= count) return none;
  // The `width` neighbours nearest to the descriptor: the positives that are kept, or the negatives that are not.
  const int64_t width = positives ? count : size - count;
  int64_t low = 0, high = size - width;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (descriptor - x.at(middle) > x.at(middle + width) - descriptor)
      low = middle + 1;
    else
      high = middle;
  }
  const auto distance = [&](int64_t q) {
    const scalar_t d = descriptor - x.at(q);
    return d < 0 ? -d : d;
  };
  if (positives) {
    const scalar_t left = distance(low), right = distance(low + width - 1);
    return left > right ? left : right;
  }
  scalar_t bound = scalar_t(INFINITY);  // the nearest of those outside
  if (low > 0) bound = distance(low - 1);
  if (low + width < size) {
    const scalar_t right = distance(low + width);
    bound = right < bound ? right : bound;
  }
  return bound;
}

}  // namespace pglcl
