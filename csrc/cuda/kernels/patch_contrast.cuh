// Fused contrastive loss on the GPU (METHOD sections 4 and 5), what its kernels share: arguments, the decision whether
// a pair counts, and the plain kernels for float64, any depth and any alignment. The fast ones are in
// patch_contrast_tiles.cuh.
#pragma once

#include <cmath>

#include "device.h"

namespace pglcl::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kContrastThreads = 128;

PGLCL_DEVICE float power2(float x) { return exp2_fast(x); }
PGLCL_DEVICE double power2(double x) { return exp2(x); }
PGLCL_DEVICE float logarithm2(float x) { return log2f(x); }
PGLCL_DEVICE double logarithm2(double x) { return log2(x); }

// T: element type of the embeddings; scalar_t: of everything that is summed.
template <typename T>
struct ContrastArguments {
  using scalar_t = typename Accumulate<T>::type;
  const T *anchors, *keys;
  int64_t n, m, depth;
  const int64_t *labels, *key_labels;
  const scalar_t *descriptors, *key_descriptors;  // null without
  int64_t channels;
  scalar_t positive_bound, negative_bound;
  const scalar_t *positive_bounds, *negative_bounds;  // (n,), null: the scalars apply
  const uint8_t *positive_mask, *negative_mask;       // null: the rule applies
  int64_t positive_stride[2], negative_stride[2];
  scalar_t scale;  // log2(e) / temperature
  scalar_t temperature, negative_weight;
  int64_t ignore_index;
  int64_t self_offset;  // anchor i and key i + self_offset are the same patch; negative: none is
};

// What the backward pass knows of an anchor besides.
template <typename scalar_t>
struct ContrastGradients {
  const scalar_t* grad;  // dL/d(loss): one number, or one per anchor
  bool grad_per_anchor;
  const int64_t* num_valid;  // null unless the loss is a mean
  const scalar_t* lse;
  const int32_t* num_positives;
};

// An anchor or key as a pair sees it.
template <typename scalar_t>
struct Patch {
  int64_t index;  // -1: beyond the end
  int64_t label;
  scalar_t descriptor;
};

// What a pair needs of its anchor. Exponents are in units of log 2.
template <typename scalar_t>
struct AnchorTerms {
  scalar_t positive_bound, negative_bound;
  scalar_t shift;              // log2 of the denominator
  scalar_t coefficient, mean;  // dL/d(dot): coefficient (p - 1 / |P|) = coefficient p - mean
};

struct PairKind {
  bool positive, negative, undecided;
};

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE Patch<scalar_t> load_patch(const ContrastArguments<T>& x, int64_t i, bool as_anchor) {
  Patch<scalar_t> patch{-1, x.ignore_index, 0};
  if (i >= (as_anchor ? x.n : x.m)) return patch;
  patch.index = i;
  patch.label = Global<const int64_t>(as_anchor ? x.labels : x.key_labels).load(i);
  if (x.descriptors && x.channels == 1)
    patch.descriptor = Global<const scalar_t>(as_anchor ? x.descriptors : x.key_descriptors).load(i);
  return patch;
}

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<scalar_t> load_terms(const ContrastArguments<T>& x, int64_t i) {
  // An anchor that does not count: 2^(s - inf) = 0 times 0.
  AnchorTerms<scalar_t> terms{x.positive_bound, x.negative_bound, scalar_t(INFINITY), 0, 0};
  if (i >= x.n) return terms;
  if (x.positive_bounds) terms.positive_bound = Global<const scalar_t>(x.positive_bounds).load(i);
  if (x.negative_bounds) terms.negative_bound = Global<const scalar_t>(x.negative_bounds).load(i);
  return terms;
}

// The same for the backward pass.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<scalar_t> load_terms(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                                              int64_t i) {
  AnchorTerms<scalar_t> terms = load_terms<T>(x, i);
  if (i >= x.n) return terms;
  const int32_t count = Global<const int32_t>(g.num_positives).load(i);
  if (count == 0) return terms;
  scalar_t upstream = Global<const scalar_t>(g.grad).load(g.grad_per_anchor ? i : 0);
  if (g.num_valid) {
    const int64_t valid = Global<const int64_t>(g.num_valid).load(0);
    upstream /= scalar_t(valid > 1 ? valid : 1);
  }
  terms.shift = Global<const scalar_t>(g.lse).load(i) * scalar_t(kLog2E);
  terms.coefficient = upstream / x.temperature;
  terms.mean = terms.coefficient / scalar_t(count);
  return terms;
}

// Whether key j is a positive or negative of anchor i (METHOD section 4).
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE PairKind decide(const ContrastArguments<T>& x, const Patch<scalar_t>& anchor, const Patch<scalar_t>& key,
                             scalar_t positive_bound, scalar_t negative_bound) {
  PairKind kind{false, false, false};
  if (anchor.index < 0 || key.index < 0 || anchor.label == x.ignore_index || key.label == x.ignore_index) return kind;
  if (x.self_offset >= 0 && key.index == anchor.index + x.self_offset) return kind;
  if (x.positive_mask) {
    kind.positive = Global<const uint8_t>(x.positive_mask)
                        .load(anchor.index * x.positive_stride[0] + key.index * x.positive_stride[1]);
    kind.negative = Global<const uint8_t>(x.negative_mask)
                        .load(anchor.index * x.negative_stride[0] + key.index * x.negative_stride[1]);
    return kind;
  }
  scalar_t delta = anchor.descriptor - key.descriptor;
  delta = delta < 0 ? -delta : delta;
  if (x.descriptors && x.channels > 1) {
    const Global<const scalar_t> a(x.descriptors), b(x.key_descriptors);
    delta = 0;
    for (int64_t c = 0; c < x.channels; ++c) {
      const scalar_t d = a.load(anchor.index * x.channels + c) - b.load(key.index * x.channels + c);
      delta += d < 0 ? -d : d;
    }
    delta /= scalar_t(x.channels);
  }
  // Neither a descriptor nor a bound that is not a number says which pairs count.
  kind.undecided =
      !(delta < scalar_t(INFINITY)) || positive_bound != positive_bound || negative_bound != negative_bound;
  const bool same = anchor.label == key.label;
  kind.positive = same && delta <= positive_bound;
  kind.negative = !same && delta >= negative_bound;
  return kind;
}

// Sums of one anchor over the keys it has met, with a running maximum.
template <typename scalar_t>
struct RunningSums {
  scalar_t highest = -scalar_t(INFINITY), sum = 0;  // of 2^exponent, less the maximum
  scalar_t positive_dot = 0;
  int32_t positives = 0;
  bool undecided = false;

  PGLCL_DEVICE void add(scalar_t exponent) {
    if (exponent > highest) {
      // exponent - exponent: NaN, where an infinite logit leaves no answer.
      sum = sum * power2(highest - exponent) + power2(exponent - exponent);
      highest = exponent;
    } else {
      sum += power2(exponent - highest);
    }
  }

  template <typename T>
  PGLCL_DEVICE void meet(const ContrastArguments<T>& x, const PairKind& kind, scalar_t dot) {
    undecided = undecided || kind.undecided;
    if (kind.positive) {
      add(dot * x.scale);
      positive_dot += dot;
      ++positives;
    }
    if (kind.negative && x.negative_weight > 0) add(dot * x.scale + logarithm2(x.negative_weight));
  }

  // What the neighbour at `lane_mask` has met is met here as well.
  PGLCL_DEVICE void merge(int lane_mask) {
    const scalar_t other_highest = shuffle_xor(highest, lane_mask), other_sum = shuffle_xor(sum, lane_mask);
    positive_dot += shuffle_xor(positive_dot, lane_mask);
    positives += shuffle_xor(positives, lane_mask);
    undecided = shuffle_xor(int(undecided), lane_mask) || undecided;
    const scalar_t top = other_highest > highest ? other_highest : highest;
    if (top > -scalar_t(INFINITY)) {
      // Addition commutes, so both lanes get the same bits.
      sum = sum * power2(highest - top) + other_sum * power2(other_highest - top);
      highest = top;
    } else {
      sum += other_sum;  // 0, or the NaN of a logit that is none
    }
  }

  template <typename T>
  PGLCL_DEVICE void write(const ContrastArguments<T>& x, int64_t i, Global<scalar_t> lse, Global<scalar_t> logit,
                          Global<int32_t> count) const {
    const bool met = sum != scalar_t(0) || positives > 0;
    scalar_t value = met ? (highest + logarithm2(sum)) * scalar_t(kLn2) : -scalar_t(INFINITY);
    if (undecided) value = scalar_t(NAN);
    lse.store(i, value);
    logit.store(i, positives ? positive_dot / (x.temperature * scalar_t(positives)) : scalar_t(0));
    count.store(i, undecided && positives == 0 ? 1 : positives);
  }
};

// dL/d(dot) of a pair, from its anchor's side.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE scalar_t pair_weight(const ContrastArguments<T>& x, const PairKind& kind,
                                  const AnchorTerms<scalar_t>& terms, scalar_t dot) {
  scalar_t weight = 0;
  if (!kind.positive && !kind.negative) return weight;
  const scalar_t p = power2(dot * x.scale - terms.shift);
  if (kind.positive) weight += terms.coefficient * p - terms.mean;
  if (kind.negative && x.negative_weight > 0) weight += terms.coefficient * (x.negative_weight * p);
  return weight;
}

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE scalar_t warp_dot(Global<const T> a, int64_t i, Global<const T> b, int64_t j, int64_t depth) {
  scalar_t sum = 0;
  for (int64_t d = thread_index() % 32; d < depth; d += 32)
    sum += scalar_t(widen(a.load(i * depth + d))) * scalar_t(widen(b.load(j * depth + d)));
  return warp_sum(sum);
}

// One warp per anchor meets every key.
template <typename T>
PGLCL_KERNEL contrast_forward_plain(ContrastArguments<T> x, typename Accumulate<T>::type* lse,
                                    typename Accumulate<T>::type* logit, int32_t* count) {
  using scalar_t = typename Accumulate<T>::type;
  const int64_t i = int64_t(block_index()) * (kContrastThreads / 32) + thread_index() / 32;
  if (i >= x.n) return;  // the whole warp
  const Patch<scalar_t> anchor = load_patch(x, i, true);
  const AnchorTerms<scalar_t> terms = load_terms<T>(x, i);
  RunningSums<scalar_t> sums;
  for (int64_t j = 0; j < x.m; ++j) {
    const PairKind kind = decide(x, anchor, load_patch(x, j, false), terms.positive_bound, terms.negative_bound);
    if (!kind.positive && !kind.negative && !kind.undecided) continue;  // the same in all lanes
    sums.meet(x, kind, warp_dot<T>(x.anchors, i, x.keys, j, x.depth));
  }
  if (thread_index() % 32 == 0) sums.write(x, i, lse, logit, count);
}

constexpr int kPlainDepth = 512;  // columns of the gradient summed at once: 4 warps x 512 x 8 bytes = 16 KiB

// One warp per row of the gradient. own_anchor: the row is an anchor and meets every key; own_key: it is a key and
// meets every anchor; both, when the anchors are the keys.
template <typename T>
PGLCL_KERNEL contrast_backward_plain(ContrastArguments<T> x, ContrastGradients<typename Accumulate<T>::type> g,
                                     T* grad_data, bool own_anchor, bool own_key) {
  using scalar_t = typename Accumulate<T>::type;
  SharedMemory memory;
  const Shared<scalar_t> sums = memory.take<scalar_t>(kContrastThreads / 32 * kPlainDepth);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int64_t row = int64_t(block_index()) * (kContrastThreads / 32) + warp;
  const int64_t rows = own_anchor ? x.n : x.m;
  if (row >= rows) return;  // the whole warp
  const Global<const T> own_rows(own_anchor ? x.anchors : x.keys), other_rows(own_anchor ? x.keys : x.anchors);
  const Global<T> grad(grad_data);
  const int64_t others = own_anchor ? x.m : x.n;
  const Patch<scalar_t> own = load_patch(x, row, own_anchor);
  const AnchorTerms<scalar_t> own_terms = load_terms<T>(x, g, own_anchor ? row : x.n);
  const bool unknown = own_anchor && own_terms.shift != own_terms.shift;

  for (int64_t first = 0; first < x.depth; first += kPlainDepth) {
    const int64_t width = x.depth - first < kPlainDepth ? x.depth - first : kPlainDepth;
    for (int64_t d = lane; d < width; d += 32)
      sums.store(warp * kPlainDepth + d, unknown ? scalar_t(NAN) : scalar_t(0));
    for (int64_t j = 0; j < others; ++j) {
      const Patch<scalar_t> other = load_patch(x, j, !own_anchor);
      const AnchorTerms<scalar_t> other_terms = load_terms<T>(x, g, own_key ? j : x.n);
      PairKind as_anchor{}, as_key{};
      if (own_anchor) as_anchor = decide(x, own, other, own_terms.positive_bound, own_terms.negative_bound);
      if (own_key) as_key = decide(x, other, own, other_terms.positive_bound, other_terms.negative_bound);
      if (!as_anchor.positive && !as_anchor.negative && !as_key.positive && !as_key.negative) continue;
      const scalar_t dot = warp_dot<T>(own_rows, row, other_rows, j, x.depth);
      const scalar_t weight = pair_weight(x, as_anchor, own_terms, dot) + pair_weight(x, as_key, other_terms, dot);
      for (int64_t d = lane; d < width; d += 32) {
        const int64_t at = warp * kPlainDepth + d;
        sums.store(at, sums.load(at) + weight * scalar_t(widen(other_rows.load(j * x.depth + first + d))));
      }
    }
    for (int64_t d = lane; d < width; d += 32)
      grad.store(row * x.depth + first + d, narrow<T>(sums.load(warp * kPlainDepth + d)));
  }
}

constexpr int kReduceThreads = 256;

// The loss from the sums of its anchors: one block, in a fixed order. loss holds n numbers, or one.
template <typename scalar_t>
PGLCL_KERNEL contrast_reduce(const scalar_t* lse_data, const scalar_t* logit_data, const int32_t* count_data, int64_t n,
                             bool per_anchor, bool mean, scalar_t* loss_data, int64_t* num_valid_data) {
  const Global<const scalar_t> lse(lse_data), logit(logit_data);
  const Global<const int32_t> count(count_data);
  const Global<scalar_t> loss(loss_data);
  PGLCL_STATIC_SHARED(double, totals, kReduceThreads);
  PGLCL_STATIC_SHARED(int64_t, counted, kReduceThreads);
  const int thread = thread_index();
  double total = 0;
  int64_t valid = 0;
  for (int64_t i = thread; i < n; i += kReduceThreads) {
    const bool counts = count.load(i) > 0;
    const scalar_t value = counts ? lse.load(i) - logit.load(i) : scalar_t(0);
    if (per_anchor) loss.store(i, value);
    total += double(value);
    valid += counts;
  }
  totals.store(thread, total);
  counted.store(thread, valid);
  for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (thread < half) {
      totals.store(thread, totals.load(thread) + totals.load(thread + half));
      counted.store(thread, counted.load(thread) + counted.load(thread + half));
    }
  }
  if (thread != 0) return;
  valid = counted.load(0);
  if (!per_anchor) loss.store(0, scalar_t(mean ? totals.load(0) / double(valid > 1 ? valid : 1) : totals.load(0)));
  Global<int64_t>(num_valid_data).store(0, valid);
}

}  // namespace pglcl::cuda
