// Fused contrastive loss on the GPU (method, sections 4 and 5), what its kernels share: arguments, the decision whether
// a pair counts, and the plain kernels for float64, any depth and any alignment. The fast ones are in
// patch_contrast_tiles.cuh.
#pragma once

#include <cmath>

#include "device.h"

namespace pglcl::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kContrastThreads = 128;

// 2^x, and e^x of a number that is at most 0: differences to a maximum, for which results below the normal range are 0.
PGLCL_DEVICE float power2(float x) { return exp2_fast(x); }
PGLCL_DEVICE double power2(double x) { return exp2(x); }
template <typename scalar_t>
PGLCL_DEVICE scalar_t power_e(scalar_t x) {
  return power2(x * scalar_t(kLog2E));
}
PGLCL_DEVICE float logarithm2(float x) { return log2f(x); }
PGLCL_DEVICE double logarithm2(double x) { return log2(x); }

// log(e^a + e^b); a sum that is no number stays none.
template <typename scalar_t>
PGLCL_DEVICE scalar_t log_add(scalar_t a, scalar_t b) {
  const bool first = a > b;
  const scalar_t high = first ? a : b, low = first ? b : a;
  return low == -scalar_t(INFINITY) ? high : high + log_of_one_and(power_e(low - high));
}

// The lowest finite number: the logit of a pair that does not count.
template <typename scalar_t>
constexpr scalar_t kLowest = sizeof(scalar_t) == 8 ? scalar_t(-1.7976931348623157e308) : scalar_t(-3.402823466e38f);
// The maximum of nothing, so far above it that e^(kLowest - kNothing) is 0: neither needs a special case.
template <typename scalar_t>
constexpr scalar_t kNothing = kLowest<scalar_t> * scalar_t(0.999);

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
  scalar_t inverse_temperature;
  scalar_t log_weight;  // log(negative_weight); -inf, for a weight of 0: negatives do not count
  int64_t ignore_index;
  int64_t self_offset;  // anchor i and key i + self_offset are the same patch; negative: none is
};

// What the forward pass writes for each anchor. The sum over its pairs is e^(max_logit + log_sum), and the two are kept
// apart: added, they would be rounded, and backward would exponentiate the error.
template <typename scalar_t>
struct ContrastSums {
  scalar_t *max_logit, *log_sum, *positive_logit;
  int32_t* num_positives;
  scalar_t* losses;  // of the anchors; 0 without a positive
};

// What the backward pass knows of an anchor besides.
template <typename scalar_t>
struct ContrastGradients {
  const scalar_t* grad;  // dL/d(loss): one number, or one per anchor
  bool grad_per_anchor;
  const int64_t* num_valid;  // null unless the loss is a mean
  const scalar_t *max_logit, *log_sum;
  const int32_t* num_positives;
};

// An anchor or key as a pair sees it. Where there is none, or it is ignored, its descriptor is no number, so that no
// comparison holds.
template <typename scalar_t>
struct Patch {
  int64_t label;
  scalar_t descriptor;
  bool counts;
};

// What a pair needs of its anchor. The bounds of an anchor that does not count are no numbers: no comparison holds.
template <typename scalar_t>
struct AnchorTerms {
  scalar_t positive_bound, negative_bound;
  scalar_t max_logit;
  // To the base 2: of the sum of all pairs, over e^max_logit, and of that sum over the weight of a negative.
  scalar_t log_sum, log_negative;
  scalar_t coefficient, mean;  // dL/d(dot): coefficient (p - 1 / |P|) = coefficient p - mean
  bool counts;
  bool undecided;  // a bound is no number
};

struct PairKind {
  bool positive, negative, undecided;
};

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE Patch<scalar_t> load_patch(const ContrastArguments<T>& x, int64_t i, bool as_anchor) {
  Patch<scalar_t> patch{0, scalar_t(NAN), false};
  if (i >= (as_anchor ? x.n : x.m)) return patch;
  patch.label = Global<const int64_t>(as_anchor ? x.labels : x.key_labels).load(i);
  if (patch.label == x.ignore_index) return patch;
  patch.counts = true;
  patch.descriptor = 0;
  if (x.descriptors && x.channels == 1)
    patch.descriptor = Global<const scalar_t>(as_anchor ? x.descriptors : x.key_descriptors).load(i);
  return patch;
}

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<scalar_t> no_terms() {
  return {scalar_t(NAN), scalar_t(NAN), 0, 0, 0, 0, 0, false, false};
}

template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<scalar_t> load_terms(const ContrastArguments<T>& x, int64_t i, const Patch<scalar_t>& anchor) {
  AnchorTerms<scalar_t> terms = no_terms<T>();
  if (!anchor.counts) return terms;
  terms.counts = true;
  terms.positive_bound = x.positive_bounds ? Global<const scalar_t>(x.positive_bounds).load(i) : x.positive_bound;
  terms.negative_bound = x.negative_bounds ? Global<const scalar_t>(x.negative_bounds).load(i) : x.negative_bound;
  terms.undecided = terms.positive_bound != terms.positive_bound || terms.negative_bound != terms.negative_bound;
  if (x.log_weight == -scalar_t(INFINITY)) terms.negative_bound = scalar_t(INFINITY);
  return terms;
}

// The same for the backward pass. An anchor without a positive has no part in the loss, and one whose loss nobody asks
// for has none in the gradient, be it a number or not.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<scalar_t> load_terms(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                                              int64_t i, const Patch<scalar_t>& anchor) {
  if (!anchor.counts) return no_terms<T>();
  const int32_t count = Global<const int32_t>(g.num_positives).load(i);
  if (count == 0) return no_terms<T>();
  scalar_t upstream = Global<const scalar_t>(g.grad).load(g.grad_per_anchor ? i : 0);
  if (upstream == scalar_t(0)) return no_terms<T>();
  AnchorTerms<scalar_t> terms = load_terms<T>(x, i, anchor);
  if (g.num_valid) {
    const int64_t valid = Global<const int64_t>(g.num_valid).load(0);
    upstream /= scalar_t(valid > 1 ? valid : 1);
  }
  terms.max_logit = Global<const scalar_t>(g.max_logit).load(i);
  const scalar_t log_sum = Global<const scalar_t>(g.log_sum).load(i);
  terms.log_sum = log_sum * scalar_t(kLog2E);
  terms.log_negative = (log_sum - x.log_weight) * scalar_t(kLog2E);
  terms.coefficient = upstream * x.inverse_temperature;
  terms.mean = terms.coefficient / scalar_t(count);
  return terms;
}

// Whether key j is a positive or negative of anchor i, by label and one descriptor (method, section 4). One comparison
// decides: what does not count has a descriptor or bounds that are no numbers, and so is its margin.
template <typename scalar_t>
PGLCL_DEVICE PairKind decide_by_rule(const Patch<scalar_t>& a, const Patch<scalar_t>& b, scalar_t positive_bound,
                                     scalar_t negative_bound) {
  const scalar_t disparity = absolute(a.descriptor - b.descriptor);
  const bool same = a.label == b.label;
  const bool counts = (same ? positive_bound - disparity : disparity - negative_bound) >= 0;
  return {same && counts, !same && counts, false};
}

// The same with masks or several channels, and with whether the pair could be decided at all.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE PairKind decide(const ContrastArguments<T>& x, int64_t i, const Patch<scalar_t>& anchor, int64_t j,
                             const Patch<scalar_t>& key, const AnchorTerms<scalar_t>& terms) {
  PairKind kind{false, false, false};
  if (!terms.counts || !key.counts) return kind;
  if (x.self_offset >= 0 && j == i + x.self_offset) return kind;
  if (x.positive_mask) {
    kind.positive = Global<const uint8_t>(x.positive_mask).load(i * x.positive_stride[0] + j * x.positive_stride[1]);
    kind.negative = Global<const uint8_t>(x.negative_mask).load(i * x.negative_stride[0] + j * x.negative_stride[1]);
    if (x.log_weight == -scalar_t(INFINITY)) kind.negative = false;
    return kind;
  }
  scalar_t delta = absolute(anchor.descriptor - key.descriptor);
  if (x.descriptors && x.channels > 1) {
    const Global<const scalar_t> a(x.descriptors), b(x.key_descriptors);
    delta = 0;
    for (int64_t c = 0; c < x.channels; ++c) {
      delta += absolute(a.load(i * x.channels + c) - b.load(j * x.channels + c));
    }
    delta /= scalar_t(x.channels);
  }
  // Neither a descriptor nor a bound that is not a number says which pairs count.
  kind.undecided = !(delta < scalar_t(INFINITY)) || terms.undecided;
  const bool same = anchor.label == key.label;
  kind.positive = same && delta <= terms.positive_bound;
  kind.negative = !same && delta >= terms.negative_bound;
  return kind;
}

// Rounded once, the same in both passes. The weight of a negative is no part of it: in a large logit it would drown.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE scalar_t pair_logit(const ContrastArguments<T>& x, scalar_t dot) {
  return multiply_add(dot, x.inverse_temperature, scalar_t(0));
}

// What a whole set of keys says about whether an anchor's pairs can be decided: as decide() has it pair by pair.
template <typename scalar_t>
struct KeyScan {
  int32_t counted = 0;                                                  // keys that count
  int32_t unknown = 0;                                                  // whether a descriptor of theirs is not finite
  scalar_t lowest = scalar_t(INFINITY), highest = -scalar_t(INFINITY);  // of the others

  PGLCL_DEVICE void add(const Patch<scalar_t>& key) {
    if (!key.counts) return;
    ++counted;
    const bool finite = key.descriptor - key.descriptor == 0;
    unknown |= !finite;
    lowest = minimum(lowest, finite ? key.descriptor : lowest);
    highest = maximum(highest, finite ? key.descriptor : highest);
  }
  PGLCL_DEVICE void merge(const KeyScan& other) {
    counted += other.counted;
    unknown |= other.unknown;
    lowest = minimum(lowest, other.lowest);
    highest = maximum(highest, other.highest);
  }
  // `itself`: whether the anchor is among the keys that count. A key that spoils an anchor of finite descriptor is
  // another one.
  PGLCL_DEVICE bool undecided(const Patch<scalar_t>& anchor, const AnchorTerms<scalar_t>& terms, bool itself) const {
    if (!terms.counts || counted == int32_t(itself)) return false;
    const scalar_t a = anchor.descriptor;
    const bool finite = a - a == 0 && !(a - lowest == scalar_t(INFINITY)) && !(highest - a == scalar_t(INFINITY));
    return terms.undecided || unknown || !finite;
  }
};

// Sums of one anchor over the keys it has met, with a running maximum.
template <typename scalar_t>
struct RunningSums {
  scalar_t highest = kNothing<scalar_t>;  // of the logits met
  scalar_t sum = 0, negative_sum = 0;     // of e^(logit - highest), of the positives and of the negatives
  scalar_t spread = 0;                    // of logit - highest over the positives: no large number is summed
  int32_t positives = 0;
  bool undecided = false;

  // Everything is counted from a new maximum.
  PGLCL_DEVICE void raise(scalar_t top) {
    const scalar_t step = highest - top;
    const scalar_t factor = power_e(step);
    sum *= factor;
    negative_sum *= factor;
    if (positives > 0) spread += scalar_t(positives) * step;
    highest = top;
  }

  // Logits of pairs that do not count are kLowest; bits k of `positive` and `negative` say what logit k is. Minus
  // infinity may be a product of which only a part left the range: as that of a negative it makes the loss no number,
  // instead of a share of 0.
  template <int kCount>
  PGLCL_DEVICE void add(const scalar_t (&logits)[kCount], uint32_t positive, uint32_t negative) {
    scalar_t top = highest;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = maximum(top, logits[k]);  // of numbers; NaN shows in the sum
    raise(top);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const scalar_t below = logits[k] - highest;  // NaN, where an infinite logit leaves no answer
      const scalar_t share = power_e(below);
      if (positive >> k & 1) {
        sum += share;
        spread += below;
      }
      if (negative >> k & 1) negative_sum += multiply_add(logits[k], scalar_t(0), share);
    }
    positives += count_bits(positive);
  }

  // What the neighbour at `lane_mask` has met is met here as well. The two lanes may differ in the last bit, as a
  // product may go unrounded into a sum: one of them writes.
  PGLCL_DEVICE void merge(int lane_mask) {
    RunningSums other;
    other.highest = shuffle_xor(highest, lane_mask);
    other.sum = shuffle_xor(sum, lane_mask);
    other.negative_sum = shuffle_xor(negative_sum, lane_mask);
    other.spread = shuffle_xor(spread, lane_mask);
    other.positives = shuffle_xor(positives, lane_mask);
    other.undecided = shuffle_xor(int(undecided), lane_mask);
    merge(other);
  }
  PGLCL_DEVICE void merge(RunningSums other) {
    const scalar_t top = maximum(highest, other.highest);
    raise(top);
    other.raise(top);
    sum += other.sum;
    negative_sum += other.negative_sum;
    spread += other.spread;
    positives += other.positives;
    undecided = undecided || other.undecided;
  }

  // Without a pair the maximum and the sum are those of nothing, minus infinity both.
  PGLCL_DEVICE void write(int64_t i, scalar_t log_weight, const ContrastSums<scalar_t>& out) const {
    const bool met = sum != scalar_t(0) || negative_sum != scalar_t(0) || positives > 0;
    const scalar_t of_negatives = log_weight + logarithm2(negative_sum) * scalar_t(kLn2);
    const scalar_t log_sum = undecided ? scalar_t(NAN) : log_add(logarithm2(sum) * scalar_t(kLn2), of_negatives);
    const scalar_t mean_spread = positives ? spread / scalar_t(positives) : scalar_t(0);
    const bool counts = positives > 0 || undecided;
    Global<scalar_t>(out.max_logit).store(i, undecided ? scalar_t(NAN) : met ? highest : -scalar_t(INFINITY));
    Global<scalar_t>(out.log_sum).store(i, log_sum);
    Global<scalar_t>(out.positive_logit).store(i, positives ? highest + mean_spread : scalar_t(0));
    Global<int32_t>(out.num_positives).store(i, counts && positives == 0 ? 1 : positives);
    // Not log_sum + maximum - positive_logit: what is large has cancelled already.
    Global<scalar_t>(out.losses).store(i, counts ? log_sum - mean_spread : scalar_t(0));
  }
};

// dL/d(dot) of a pair, from its anchor's side. No share is above 1 but by rounding: the maximum bounds the logit,
// whatever the rounding, and the sum holds the pair's own term.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE scalar_t pair_weight(const ContrastArguments<T>& x, const PairKind& kind,
                                  const AnchorTerms<scalar_t>& terms, scalar_t dot) {
  const scalar_t below = minimum(pair_logit(x, dot) - terms.max_logit, scalar_t(0));
  scalar_t share = power2(multiply_add(below, scalar_t(kLog2E), kind.positive ? -terms.log_sum : -terms.log_negative));
  if (kind.positive && kind.negative) share += power2(multiply_add(below, scalar_t(kLog2E), -terms.log_negative));
  // An infinite dot is no number times 0, and so is the gradient of who uses it.
  const scalar_t rest = multiply_add(dot, scalar_t(0), kind.positive ? -terms.mean : scalar_t(0));
  const scalar_t weight = multiply_add(terms.coefficient, share, rest);
  return kind.positive || kind.negative ? weight : scalar_t(0);
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
PGLCL_KERNEL contrast_forward_plain(ContrastArguments<T> x, ContrastSums<typename Accumulate<T>::type> out) {
  using scalar_t = typename Accumulate<T>::type;
  const int64_t i = int64_t(block_index()) * (kContrastThreads / 32) + thread_index() / 32;
  if (i >= x.n) return;  // the whole warp
  const Patch<scalar_t> anchor = load_patch(x, i, true);
  const AnchorTerms<scalar_t> terms = load_terms<T>(x, i, anchor);
  RunningSums<scalar_t> sums;
  for (int64_t j = 0; j < x.m; ++j) {
    const PairKind kind = decide(x, i, anchor, j, load_patch(x, j, false), terms);
    sums.undecided = sums.undecided || kind.undecided;
    if (!kind.positive && !kind.negative) continue;  // the same in all lanes
    const scalar_t dot = warp_dot<T>(x.anchors, i, x.keys, j, x.depth);
    sums.add({pair_logit(x, dot)}, kind.positive, kind.negative);
  }
  if (thread_index() % 32 == 0) sums.write(i, x.log_weight, out);
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
  const AnchorTerms<scalar_t> own_terms = own_anchor ? load_terms<T>(x, g, row, own) : no_terms<T>();
  const bool unknown = own_terms.log_sum != own_terms.log_sum;

  for (int64_t first = 0; first < x.depth; first += kPlainDepth) {
    const int64_t width = x.depth - first < kPlainDepth ? x.depth - first : kPlainDepth;
    for (int64_t d = lane; d < width; d += 32)
      sums.store(warp * kPlainDepth + d, unknown ? scalar_t(NAN) : scalar_t(0));
    for (int64_t j = 0; j < others; ++j) {
      const Patch<scalar_t> other = load_patch(x, j, !own_anchor);
      const AnchorTerms<scalar_t> other_terms = own_key ? load_terms<T>(x, g, j, other) : no_terms<T>();
      PairKind as_anchor{}, as_key{};
      if (own_anchor) as_anchor = decide(x, row, own, j, other, own_terms);
      if (own_key) as_key = decide(x, j, other, row, own, other_terms);
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

// The loss from those of its anchors: one block, in a fixed order. loss: one number, or null where every anchor's own
// is the result.
template <typename scalar_t>
PGLCL_KERNEL contrast_reduce(const scalar_t* loss_data, const int32_t* count_data, int64_t n, bool mean,
                             scalar_t* result_data, int64_t* num_valid_data) {
  const Global<const scalar_t> losses(loss_data);
  const Global<const int32_t> count(count_data);
  PGLCL_STATIC_SHARED(double, totals, kReduceThreads);
  PGLCL_STATIC_SHARED(int64_t, counted, kReduceThreads);
  const int thread = thread_index();
  double total = 0;
  int64_t valid = 0;
  for (int64_t i = thread; i < n; i += kReduceThreads) {
    total += double(losses.load(i));
    valid += count.load(i) > 0;
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
  total = totals.load(0);
  if (result_data)
    Global<scalar_t>(result_data).store(0, scalar_t(mean ? total / double(valid > 1 ? valid : 1) : total));
  Global<int64_t>(num_valid_data).store(0, valid);
}

}  // namespace pglcl::cuda
