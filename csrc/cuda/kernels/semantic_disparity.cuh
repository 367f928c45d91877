// Semantic disparity and the bounds taken from it on the GPU (method, sections 3 and 4).
#pragma once

#include "../../shared/disparity_search.h"
#include "device.h"

namespace pglcl::cuda {

constexpr int kDisparityThreads = 128;

template <typename scalar_t>
PGLCL_DEVICE scalar_t pair_disparity(Global<const scalar_t> a, int64_t i, Global<const scalar_t> b, int64_t j,
                                     int64_t channels) {
  scalar_t sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const scalar_t d = a.load(i * channels + c) - b.load(j * channels + c);
    sum += d < 0 ? -d : d;
  }
  return sum / scalar_t(channels);
}

// Rows of a thread for one channel. It loads its column once. With several channels there is nothing to keep.
constexpr int kDisparityRows = 8;

// One thread per column; blocks in y share the rows.
template <typename scalar_t>
PGLCL_KERNEL semantic_disparity_forward(const scalar_t* a_data, const scalar_t* b_data, scalar_t* out_data, int64_t n,
                                        int64_t m, int64_t channels) {
  const Global<const scalar_t> a(a_data), b(b_data);
  const Global<scalar_t> out(out_data);
  const int64_t j = int64_t(block_index()) * kDisparityThreads + thread_index();
  if (j >= m) return;
  if (channels == 1) {  // no loop over channels, and no division
    const scalar_t own = b.load(j);
    for (int64_t i = block_index_y(); i < n; i += grid_blocks_y()) out.store(i * m + j, absolute(a.load(i) - own));
    return;
  }
  for (int64_t i = block_index_y(); i < n; i += grid_blocks_y())
    out.store(i * m + j, pair_disparity<scalar_t>(a, i, b, j, channels));
}

// A lane adds this many terms in their own type, and then adds that sum in float64. Thousands of equal terms would
// otherwise all be rounded to the same side.
constexpr int64_t kDisparityTerms = 16;

// One warp per element of the gradient: sum over j of grad_ij sign(a_ic - b_jc). Strides let the same kernel walk rows
// of grad for a and columns for b.
template <typename scalar_t>
PGLCL_KERNEL semantic_disparity_backward(const scalar_t* grad_data, const scalar_t* own_data,
                                         const scalar_t* other_data, scalar_t* out_data, int64_t own_count,
                                         int64_t other_count, int64_t channels, int64_t own_stride,
                                         int64_t other_stride) {
  const Global<const scalar_t> grad(grad_data), own(own_data), other(other_data);
  const Global<scalar_t> out(out_data);
  const int64_t i = int64_t(block_index()) * (kDisparityThreads / 32) + thread_index() / 32;
  if (i >= own_count) return;  // the whole warp
  for (int64_t c = block_index_y(); c < channels; c += grid_blocks_y()) {
    const scalar_t mine = own.load(i * channels + c);
    double sum = 0;
    for (int64_t first = thread_index() % 32; first < other_count; first += 32 * kDisparityTerms) {
      const int64_t end = first + 32 * kDisparityTerms < other_count ? first + 32 * kDisparityTerms : other_count;
      scalar_t terms = 0;
      for (int64_t j = first; j < end; j += 32) {
        const scalar_t d = mine - other.load(j * channels + c);
        const scalar_t sign = d != d ? d : scalar_t((d > 0) - (d < 0));
        terms += grad.load(i * own_stride + j * other_stride) * sign;
      }
      sum += double(terms);
    }
    sum = warp_sum(sum);
    if (thread_index() % 32 == 0) out.store(i * channels + c, scalar_t(sum / double(channels)));
  }
}

// The numbers that keys are sorted by. An ignored key comes after all others and does not count.
template <typename scalar_t>
PGLCL_KERNEL disparity_bounds_prepare(const scalar_t* descriptors, const int64_t* labels, scalar_t* value_data,
                                      int64_t* label_data, int64_t* count_data, int64_t keys, int64_t ignore_index) {
  const int64_t j = int64_t(block_index()) * kDisparityThreads + thread_index();
  if (j >= keys) return;
  const int64_t label = Global<const int64_t>(labels).load(j);
  const bool counts = label != ignore_index;
  Global<scalar_t>(value_data).store(j, counts ? Global<const scalar_t>(descriptors).load(j) : scalar_t(INFINITY));
  Global<int64_t>(label_data).store(j, counts ? label : INT64_MAX);
  Global<int64_t>(count_data).store(j, counts);
}

// For each key, its place among the members of all classes; -1 if it does not count. The q-th member is the key at
// place[q] of the order by value.
PGLCL_KERNEL disparity_bounds_members(const int64_t* order, const int64_t* place, const int64_t* counts,
                                      int64_t* member_data, int64_t keys) {
  const int64_t q = int64_t(block_index()) * kDisparityThreads + thread_index();
  if (q >= keys) return;
  const int64_t key = Global<const int64_t>(order).load(Global<const int64_t>(place).load(q));
  Global<int64_t>(member_data).store(key, Global<const int64_t>(counts).load(key) ? q : -1);
}

// One thread per anchor searches keys that were sorted before; `total` of them take part.
template <typename scalar_t>
PGLCL_KERNEL disparity_bounds_sorted(const scalar_t* descriptors, const int64_t* labels, const scalar_t* value,
                                     const int64_t* key_label, const int64_t* place, const int64_t* member_of,
                                     const int64_t* total, scalar_t* bound_data, int64_t anchors, int64_t keys,
                                     int64_t count, bool positives, int64_t ignore_index, int64_t self_offset) {
  const Global<scalar_t> bounds(bound_data);
  const int64_t i = int64_t(block_index()) * block_threads() + thread_index();
  if (i >= anchors) return;
  using Keys = SortedKeys<Global<const scalar_t>, Global<const int64_t>>;
  const Keys sorted{value, key_label, place, member_of, Global<const int64_t>(total).load(0)};
  const scalar_t none = positives ? scalar_t(INFINITY) : scalar_t(0);
  const int64_t label = Global<const int64_t>(labels).load(i);
  const int64_t self = self_offset >= 0 && i + self_offset < keys ? i + self_offset : -1;
  bounds.store(i, label == ignore_index ? none
                                        : search_bound(sorted, label, Global<const scalar_t>(descriptors).load(i), self,
                                                       count, positives, none));
}

// The integer of a number's bits. Bits of non-negative numbers have the order of the numbers.
template <typename scalar_t>
struct Ordered;
template <>
struct Ordered<float> {
  using type = uint32_t;
};
template <>
struct Ordered<double> {
  using type = uint64_t;
};

template <typename To, typename From>
PGLCL_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Several channels: one block per anchor finds the count-th smallest (or largest) disparity digit by digit, with
// histograms of eight bits counted by integer atomics, which are deterministic. No disparity is stored.
template <typename scalar_t>
PGLCL_KERNEL disparity_bounds_select(const scalar_t* descriptors, const int64_t* label_data,
                                     const scalar_t* key_descriptors, const int64_t* key_label_data,
                                     scalar_t* bound_data, int64_t keys, int64_t channels, int64_t count,
                                     bool positives, int64_t ignore_index, int64_t self_offset) {
  using bits_t = typename Ordered<scalar_t>::type;
  constexpr int kDigits = sizeof(bits_t);
  const Global<const int64_t> labels(label_data), key_labels(key_label_data);
  const Global<scalar_t> bounds(bound_data);
  PGLCL_STATIC_SHARED(int, histogram, 256);
  PGLCL_STATIC_SHARED(bits_t, prefix_found, 1);
  PGLCL_STATIC_SHARED(int64_t, left_to_skip, 1);
  const int64_t i = block_index();
  const int64_t label = labels.load(i);
  if (thread_index() == 0) {
    prefix_found.store(0, 0);
    left_to_skip.store(0, count);
  }
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    for (int bin = thread_index(); bin < 256; bin += block_threads()) histogram.store(bin, 0);
    sync_threads();
    const bits_t prefix = prefix_found.load(0);
    for (int64_t j = thread_index(); j < keys; j += block_threads()) {
      const int64_t key_label = key_labels.load(j);
      if (label == ignore_index || key_label == ignore_index || (key_label == label) != positives) continue;
      if (self_offset >= 0 && j == i + self_offset) continue;
      bits_t bits = same_bits<bits_t>(pair_disparity<scalar_t>(descriptors, i, key_descriptors, j, channels));
      if (!positives) bits = ~bits;  // the largest first
      // The digits above this one must be those found so far.
      if (digit < kDigits - 1 && (bits >> (8 * digit + 8)) != (prefix >> (8 * digit + 8))) continue;
      histogram.atomic_add(int(bits >> (8 * digit) & 255), 1);
    }
    sync_threads();
    if (thread_index() == 0) {
      int64_t left = left_to_skip.load(0);
      int bin = 0;
      for (; bin < 256 && left > histogram.load(bin); ++bin) left -= histogram.load(bin);
      // If there are no more keys than asked for, all are kept. A negative number left to skip tells this.
      int64_t beyond = 0;
      for (int rest = bin; digit == kDigits - 1 && rest < 256; ++rest) beyond += histogram.load(rest);
      if (digit == kDigits - 1 && beyond <= left) left = -1;
      prefix_found.store(0, prefix | bits_t(bin < 256 ? bin : 0) << (8 * digit));
      left_to_skip.store(0, left);
    }
    sync_threads();
    if (left_to_skip.load(0) < 0) break;  // the same in all threads
  }
  if (thread_index() != 0) return;
  const bits_t bits = prefix_found.load(0);
  const scalar_t none = positives ? scalar_t(INFINITY) : scalar_t(0);
  bounds.store(i, left_to_skip.load(0) < 0 ? none : same_bits<scalar_t>(bits_t(positives ? bits : ~bits)));
}

// --- launches --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
void run_disparity_forward(const scalar_t* a, const scalar_t* b, scalar_t* out, int64_t n, int64_t m, int64_t channels,
                           PglclStream stream) {
  if (n * m == 0) return;
  const int64_t blocks = channels == 1 ? (n + kDisparityRows - 1) / kDisparityRows : n;
  PGLCL_LAUNCH(semantic_disparity_forward<scalar_t>, (m + kDisparityThreads - 1) / kDisparityThreads,
               blocks < kMostRowsOfBlocks ? blocks : kMostRowsOfBlocks, kDisparityThreads, 0, stream, a, b, out, n, m,
               channels);
}

// The gradient of a with (own, other) = (a, b) and the strides of grad; that of b with (b, a) and the strides
// exchanged.
template <typename scalar_t>
void run_disparity_backward(const scalar_t* grad, const scalar_t* own, const scalar_t* other, scalar_t* out,
                            int64_t own_count, int64_t other_count, int64_t channels, int64_t own_stride,
                            int64_t other_stride, PglclStream stream) {
  constexpr int kWarps = kDisparityThreads / 32;
  if (own_count == 0) return;
  PGLCL_LAUNCH(semantic_disparity_backward<scalar_t>, (own_count + kWarps - 1) / kWarps,
               channels < kMostRowsOfBlocks ? channels : kMostRowsOfBlocks, kDisparityThreads, 0, stream, grad, own,
               other, out, own_count, other_count, channels, own_stride, other_stride);
}

template <typename scalar_t>
struct BoundsInputs {
  const scalar_t *descriptors, *key_descriptors;
  const int64_t *labels, *key_labels;
  int64_t anchors, keys, channels, count, ignore_index, self_offset;
  bool positives;
};

template <typename scalar_t>
void run_bounds_prepare(const scalar_t* descriptors, const int64_t* labels, int64_t keys, int64_t ignore_index,
                        scalar_t* value, int64_t* label, int64_t* counts, PglclStream stream) {
  if (keys == 0) return;
  PGLCL_LAUNCH(disparity_bounds_prepare<scalar_t>, (keys + kDisparityThreads - 1) / kDisparityThreads, 1,
               kDisparityThreads, 0, stream, descriptors, labels, value, label, counts, keys, ignore_index);
}

inline void run_bounds_members(const int64_t* order, const int64_t* place, const int64_t* counts, int64_t keys,
                               int64_t* member_of, PglclStream stream) {
  if (keys == 0) return;
  PGLCL_LAUNCH(disparity_bounds_members, (keys + kDisparityThreads - 1) / kDisparityThreads, 1, kDisparityThreads, 0,
               stream, order, place, counts, member_of, keys);
}

// The arrays of SortedKeys. The number of keys that take part lies on the device, too.
template <typename scalar_t>
struct SortedInputs {
  const scalar_t* value;
  const int64_t *label, *place, *member_of, *total;
};

template <typename scalar_t>
void run_bounds_sorted(const BoundsInputs<scalar_t>& x, const SortedInputs<scalar_t>& sorted, scalar_t* bounds,
                       PglclStream stream) {
  if (x.anchors == 0) return;
  PGLCL_LAUNCH(disparity_bounds_sorted<scalar_t>, (x.anchors + kDisparityThreads - 1) / kDisparityThreads, 1,
               kDisparityThreads, 0, stream, x.descriptors, x.labels, sorted.value, sorted.label, sorted.place,
               sorted.member_of, sorted.total, bounds, x.anchors, x.keys, x.count, x.positives, x.ignore_index,
               x.self_offset);
}

template <typename scalar_t>
void run_bounds_select(const BoundsInputs<scalar_t>& x, scalar_t* bounds, PglclStream stream) {
  if (x.anchors == 0) return;
  PGLCL_LAUNCH(disparity_bounds_select<scalar_t>, x.anchors, 1, kDisparityThreads, 0, stream, x.descriptors, x.labels,
               x.key_descriptors, x.key_labels, bounds, x.keys, x.channels, x.count, x.positives, x.ignore_index,
               x.self_offset);
}

}  // namespace pglcl::cuda
