// What the kernels of the fused contrastive loss share (method, sections 4 and 5): arguments, the decision whether a
// pair counts, and the plain kernels for float64, any depth and any alignment. The fast kernels are in
// patch_contrast_tiles.cuh and patch_contrast_mma.cuh.
#pragma once

#include <cmath>

#include "device.h"

namespace pglcl::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kContrastThreads = 128;

// 2^x and e^x of differences to a maximum, which are at most 0. In float32, results below the normal range are 0.
PGLCL_DEVICE float power2(float x) { return exp2_fast(x); }
PGLCL_DEVICE double power2(double x) { return exp2(x); }
template <typename scalar_t>
PGLCL_DEVICE scalar_t power_e(scalar_t x) {
  return power2(x * scalar_t(kLog2E));
}
PGLCL_DEVICE float logarithm2(float x) { return log2f(x); }
PGLCL_DEVICE double logarithm2(double x) { return log2(x); }

// log(e^a + e^b). NaN stays NaN.
template <typename scalar_t>
PGLCL_DEVICE scalar_t log_add(scalar_t a, scalar_t b) {
  const bool first = a > b;
  const scalar_t high = first ? a : b, low = first ? b : a;
  return low == -scalar_t(INFINITY) ? high : high + log_of_one_and(power_e(low - high));
}

// The lowest finite number: the logit of a pair that does not count.
template <typename scalar_t>
constexpr scalar_t kLowest = sizeof(scalar_t) == 8 ? scalar_t(-1.7976931348623157e308) : scalar_t(-3.402823466e38f);
// The maximum of no logits. It lies so far above kLowest that e^(kLowest - kNothing) is 0: neither needs a special
// case.
template <typename scalar_t>
constexpr scalar_t kNothing = kLowest<scalar_t> * scalar_t(0.999);

// T is the element type of the embeddings, scalar_t that of everything that is summed.
template <typename T>
struct ContrastArguments {
  using scalar_t = typename Accumulate<T>::type;
  const T *anchors, *keys;
  int64_t n, m, depth;
  const int64_t *labels, *key_labels;
  const scalar_t *descriptors, *key_descriptors;  // null if there are none
  int64_t channels;
  scalar_t positive_bound, negative_bound;
  const scalar_t *positive_bounds, *negative_bounds;  // (n,); null if the scalars apply
  const uint8_t *positive_mask, *negative_mask;       // null if the rule applies
  int64_t positive_stride[2], negative_stride[2];
  scalar_t inverse_temperature;
  scalar_t log_weight;  // log(negative_weight); of a weight of 0 it is -inf, and negatives do not count
  double exact_inverse_temperature, exact_log_weight;  // the same in float64
  int64_t ignore_index;
  int64_t self_offset;  // anchor i and key i + self_offset are the same patch; negative if no key is an anchor
};

// What the forward pass writes for each anchor. The sum over its pairs is e^(max_logit + log_sum). The two are kept
// apart: their sum would be rounded, and the backward pass would exponentiate the error. The maximum is a float64 for
// the anchors whose logits leave the range of float32 (contrast_finish).
template <typename scalar_t>
struct ContrastSums {
  double* max_logit;
  scalar_t *log_sum, *positive_logit;
  int32_t* num_positives;
  scalar_t* losses;  // of the anchors; 0 without a positive
};

// What the backward pass reads besides the arguments.
template <typename scalar_t>
struct ContrastGradients {
  const scalar_t* grad;  // dL/d(loss): one number, or one per anchor
  bool grad_per_anchor;
  const int64_t* num_valid;  // null unless the loss is a mean
  const double* max_logit;
  const scalar_t* log_sum;
  const int32_t* num_positives;
};

// 2^exponent, for the exponents of normal numbers.
template <typename scalar_t>
PGLCL_DEVICE scalar_t power_of_two(int exponent) {
  if constexpr (sizeof(scalar_t) == 8)
    return bits_double(uint64_t(exponent + 1023) << 52);
  else
    return bits_float(uint32_t(exponent + 127) << 23);
}

// The largest whole number below the logarithm to the base 2; -1023 for 0.
PGLCL_DEVICE int exponent_of(double x) { return int(double_bits(x) >> 52) - 1023; }

// The scale of the backward pass: weights of pairs are multiplied by a power of two, and gradients are divided by it in
// the end, so that no sum leaves its range before the gradient does. float16 always needs it. It brings the weights as
// far up as they may go: none is above twice the largest coefficient. In the other types it is 1 for the gradients of
// ordinary training. The scale itself may be no number of the type, so its root is kept, a power of two as well.
template <typename scalar_t>
class WeightScale {
 public:
  PGLCL_DEVICE explicit WeightScale(SharedMemory& memory)
      : largest_(memory.take<scalar_t>(kWarps)), roots_(memory.take<scalar_t>(2)) {}
  static constexpr int64_t bytes() { return kWarps * int64_t(sizeof(scalar_t)) + 16; }

  // Finds it from the upstream gradients. All threads of the block call this first.
  template <typename T>
  PGLCL_DEVICE void find(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g) const {
    scalar_t largest = 0;
    for (int64_t i = thread_index(); i < (g.grad_per_anchor ? x.n : 1); i += kContrastThreads) {
      const scalar_t size = absolute(Global<const scalar_t>(g.grad).load(i));
      if (size < scalar_t(INFINITY)) largest = maximum(largest, size);
    }
    for (int lane = 16; lane > 0; lane /= 2) largest = maximum(largest, shuffle_xor(largest, lane));
    if (thread_index() % 32 == 0) largest_.store(thread_index() / 32, largest);
    sync_threads();
    if (thread_index() == 0) {
      for (int warp = 1; warp < kWarps; ++warp) largest = maximum(largest, largest_.load(warp));
      const int exponent = exponent_of_root<T>(x, g, largest);
      roots_.store(0, power_of_two<scalar_t>(exponent));
      roots_.store(1, power_of_two<scalar_t>(-exponent));
    }
    sync_threads();
  }
  PGLCL_DEVICE scalar_t root() const { return roots_.load(0); }
  PGLCL_DEVICE scalar_t inverse_root() const { return roots_.load(1); }

 private:
  static constexpr int kWarps = kContrastThreads / 32;
  static constexpr int kMost = sizeof(scalar_t) == 8 ? 1000 : 120;

  template <typename T>
  PGLCL_DEVICE static int exponent_of_root(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                                           double largest) {
    int exponent = 0;  // of the scale
    if constexpr (SameType<T, Float16>::value) {
      const double valid = g.num_valid ? double(Global<const int64_t>(g.num_valid).load(0)) : 1;
      exponent = 13 - exponent_of(largest * x.exact_inverse_temperature / maximum(valid, 1.0));
    } else {
      constexpr int kLarge = 40, kModerate = 20;
      const int of_coefficients = exponent_of(largest) + exponent_of(x.exact_inverse_temperature);
      if (of_coefficients > kLarge) exponent = kModerate - of_coefficients;
    }
    const int half = exponent >> 1;
    return half < -kMost ? -kMost : half > kMost ? kMost : half;
  }

  Shared<scalar_t> largest_, roots_;
};
template <typename scalar_t>
PGLCL_DEVICE scalar_t times_square(scalar_t x, scalar_t root) {
  return x * root * root;
}

// An anchor's sums are kept in the accumulating type of T, or in float64 where float32 has no room for its logits. Such
// an anchor is called wide. Its maximum tells: logits of float64 have their last bit set, which no float32 has.
template <typename T, typename number_t>
constexpr bool kWide = sizeof(number_t) > sizeof(typename Accumulate<T>::type);
PGLCL_DEVICE bool is_wide(double max_logit) { return max_logit == max_logit && (double_bits(max_logit) & 1) != 0; }

// What a pair needs of an anchor or key. If there is none, or it is ignored, its descriptor is NaN, so that no
// comparison holds. label_t: int64_t, or int32_t for the codes of labels.
template <typename scalar_t, typename label_t = int64_t>
struct Patch {
  label_t label;
  scalar_t descriptor;
  bool counts;
};

// What a pair needs of its anchor besides. The bounds of an anchor that does not count are NaN: no comparison holds.
template <typename scalar_t>
struct AnchorTerms {
  scalar_t positive_bound, negative_bound;
  scalar_t max_logit;
  // Logarithms to the base 2: of the sum of all pairs divided by e^max_logit, and of that divided by the weight of a
  // negative.
  scalar_t log_sum, log_negative;
  scalar_t coefficient, mean;  // dL/d(dot): coefficient (p - 1 / |P|) = coefficient p - mean
  bool counts;
  bool undecided;  // a bound is NaN
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

template <typename number_t, typename T>
PGLCL_DEVICE number_t inverse_temperature(const ContrastArguments<T>& x) {
  if constexpr (kWide<T, number_t>)
    return x.exact_inverse_temperature;
  else
    return x.inverse_temperature;
}
template <typename number_t, typename T>
PGLCL_DEVICE number_t log_weight(const ContrastArguments<T>& x) {
  if constexpr (kWide<T, number_t>)
    return x.exact_log_weight;
  else
    return x.log_weight;
}

template <typename T, typename number_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<number_t> no_terms() {
  return {number_t(NAN), number_t(NAN), 0, 0, 0, 0, 0, false, false};
}

template <typename T, typename number_t = typename Accumulate<T>::type, typename label_t,
          typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<number_t> load_terms(const ContrastArguments<T>& x, int64_t i,
                                              const Patch<scalar_t, label_t>& anchor) {
  AnchorTerms<number_t> terms = no_terms<T, number_t>();
  if (!anchor.counts) return terms;
  terms.counts = true;
  terms.positive_bound = x.positive_bounds ? Global<const scalar_t>(x.positive_bounds).load(i) : x.positive_bound;
  terms.negative_bound = x.negative_bounds ? Global<const scalar_t>(x.negative_bounds).load(i) : x.negative_bound;
  terms.undecided = terms.positive_bound != terms.positive_bound || terms.negative_bound != terms.negative_bound;
  if (x.log_weight == -scalar_t(INFINITY)) terms.negative_bound = number_t(INFINITY);
  return terms;
}

// The same for the backward pass, with coefficients times root^2 (WeightScale). An anchor has no terms if it has no
// positive, since it is no part of the loss then; if its upstream gradient is 0, even where its loss is NaN; or if its
// sums are not of number_t.
template <typename T, typename number_t = typename Accumulate<T>::type, typename label_t,
          typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE AnchorTerms<number_t> load_terms(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                                              number_t root, int64_t i, const Patch<scalar_t, label_t>& anchor) {
  if (!anchor.counts) return no_terms<T, number_t>();
  const int32_t count = Global<const int32_t>(g.num_positives).load(i);
  if (count == 0) return no_terms<T, number_t>();
  number_t upstream = Global<const scalar_t>(g.grad).load(g.grad_per_anchor ? i : 0);
  if (upstream == number_t(0)) return no_terms<T, number_t>();
  const double max_logit = Global<const double>(g.max_logit).load(i);
  if (sizeof(scalar_t) < sizeof(double) && is_wide(max_logit) != kWide<T, number_t>) return no_terms<T, number_t>();
  AnchorTerms<number_t> terms = load_terms<T, number_t>(x, i, anchor);
  upstream = times_square(upstream, root);
  if (g.num_valid) {
    const int64_t valid = Global<const int64_t>(g.num_valid).load(0);
    upstream /= number_t(valid > 1 ? valid : 1);
  }
  terms.max_logit = number_t(max_logit);
  const number_t log_sum = Global<const scalar_t>(g.log_sum).load(i);
  terms.log_sum = log_sum * number_t(kLog2E);
  terms.log_negative = (log_sum - log_weight<number_t>(x)) * number_t(kLog2E);
  terms.coefficient = upstream * inverse_temperature<number_t>(x);
  terms.mean = terms.coefficient / number_t(count);
  return terms;
}

// Whether key b is a positive or negative of anchor a, by label and one descriptor (method, section 4). One comparison
// decides: what does not count has NaN for a descriptor or bounds, so its margin is NaN.
template <typename scalar_t, typename label_t>
PGLCL_DEVICE PairKind pair_kind_by_rule(const Patch<scalar_t, label_t>& a, const Patch<scalar_t, label_t>& b,
                                        scalar_t positive_bound, scalar_t negative_bound) {
  const scalar_t disparity = absolute(a.descriptor - b.descriptor);
  const bool same = a.label == b.label;
  const bool counts = (same ? positive_bound - disparity : disparity - negative_bound) >= 0;
  return {same && counts, !same && counts, false};
}

// The same with masks or several channels, and with whether the pair could be decided at all.
template <typename T, typename number_t, typename label_t, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE PairKind pair_kind(const ContrastArguments<T>& x, int64_t i, const Patch<scalar_t, label_t>& anchor,
                                int64_t j, const Patch<scalar_t, label_t>& key, const AnchorTerms<number_t>& terms) {
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
  // A descriptor that is not finite, or a bound that is NaN, does not tell whether the pair counts.
  kind.undecided = !(delta < scalar_t(INFINITY)) || terms.undecided;
  const bool same = anchor.label == key.label;
  kind.positive = same && delta <= terms.positive_bound;
  kind.negative = !same && delta >= terms.negative_bound;
  return kind;
}

// Rounded once, the same in both passes. It leaves out the weight of a negative, whose digits a large logit would lose.
template <typename T, typename number_t>
PGLCL_DEVICE number_t pair_logit(const ContrastArguments<T>& x, number_t dot) {
  const number_t logit = multiply_add(dot, inverse_temperature<number_t>(x), number_t(0));
  if constexpr (kWide<T, number_t>)
    return bits_double(double_bits(logit) | 1);
  else
    return logit;
}

// What tells for all keys together whether an anchor's pairs can be decided. pair_kind() tells it pair by pair.
template <typename scalar_t>
struct KeyScan {
  int32_t counted = 0;  // keys that count
  int32_t unknown = 0;  // whether one of their descriptors is not finite
  scalar_t lowest = scalar_t(INFINITY), highest = -scalar_t(INFINITY);  // of the finite ones

  template <typename label_t>
  PGLCL_DEVICE void add(const Patch<scalar_t, label_t>& key) {
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
  // `itself`: whether the anchor is one of the keys that count. If its descriptor is finite, an unknown key is another.
  template <typename label_t>
  PGLCL_DEVICE bool undecided(const Patch<scalar_t, label_t>& anchor, const AnchorTerms<scalar_t>& terms,
                              bool itself) const {
    if (!terms.counts || counted == int32_t(itself)) return false;
    const scalar_t a = anchor.descriptor;
    const bool finite = a - a == 0 && !(a - lowest == scalar_t(INFINITY)) && !(highest - a == scalar_t(INFINITY));
    return terms.undecided || unknown || !finite;
  }
};

// Sums of one anchor over the keys so far, with a running maximum.
template <typename scalar_t>
struct RunningSums {
  scalar_t highest = kNothing<scalar_t>;  // of the logits so far
  scalar_t sum = 0, negative_sum = 0;     // of e^(logit - highest), of the positives and of the negatives
  scalar_t spread = 0;                    // of logit - highest over the positives, so that no large number is summed
  int32_t positives = 0;
  bool undecided = false;

  // Makes `top` the maximum, from which all exponents are counted.
  PGLCL_DEVICE void raise(scalar_t top) {
    const scalar_t step = highest - top;
    const scalar_t factor = power_e(step);
    sum *= factor;
    negative_sum *= factor;
    if (positives > 0) spread += scalar_t(positives) * step;
    highest = top;
  }

  // Logits of pairs that do not count are kLowest. Bit k of `positive` and `negative` says what pair k is. A logit of
  // minus infinity may be a product of which only a part left the range. For a negative it makes the loss NaN, since a
  // share of 0 would hide it.
  template <int kCount>
  PGLCL_DEVICE void add(const scalar_t (&logits)[kCount], uint32_t positive, uint32_t negative) {
    scalar_t top = highest;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = maximum(top, logits[k]);  // passes over NaN, which shows in the sum
    raise(top);
    // The pairs of a call are summed by themselves. Added one by one to a sum of thousands, equal terms would all be
    // rounded to the same side.
    scalar_t of_positives = 0, of_negatives = 0, of_spread = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const scalar_t below = logits[k] - highest;  // NaN if both are infinite
      const scalar_t share = power_e(below);
      if (positive >> k & 1) {
        of_positives += share;
        of_spread += below;
      }
      if (negative >> k & 1) of_negatives += multiply_add(logits[k], scalar_t(0), share);
    }
    sum += of_positives;
    negative_sum += of_negatives;
    spread += of_spread;
    positives += count_bits(positive);
  }

  // Adds the sums of the lane whose number differs in `lane_mask`. The two lanes may then differ in the last bit, since
  // a product may enter a sum without being rounded. So only one of them writes.
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

  // Whether the loss is a number, not NaN.
  PGLCL_DEVICE bool is_number() const {
    const scalar_t total = sum + negative_sum + spread;
    return total == total;
  }

  // Without a pair, the maximum and the logarithm of the sum are minus infinity. What the type of the outputs has no
  // room for becomes infinite.
  template <typename stored_t>
  PGLCL_DEVICE void write(int64_t i, scalar_t log_weight, const ContrastSums<stored_t>& out) const {
    const bool met = sum != scalar_t(0) || negative_sum != scalar_t(0) || positives > 0;
    const scalar_t of_negatives = log_weight + logarithm2(negative_sum) * scalar_t(kLn2);
    const scalar_t log_sum = undecided ? scalar_t(NAN) : log_add(logarithm2(sum) * scalar_t(kLn2), of_negatives);
    const scalar_t mean_spread = positives ? spread / scalar_t(positives) : scalar_t(0);
    const bool counts = positives > 0 || undecided;
    Global<double>(out.max_logit).store(i, undecided ? scalar_t(NAN) : met ? highest : -scalar_t(INFINITY));
    Global<stored_t>(out.log_sum).store(i, stored_t(log_sum));
    Global<stored_t>(out.positive_logit).store(i, stored_t(positives ? highest + mean_spread : scalar_t(0)));
    Global<int32_t>(out.num_positives).store(i, counts && positives == 0 ? 1 : positives);
    // Not log_sum + maximum - positive_logit, whose large parts would cancel only after they were rounded.
    Global<stored_t>(out.losses).store(i, stored_t(counts ? log_sum - mean_spread : scalar_t(0)));
  }
};

// dL/d(dot) of a pair, from its anchor's side. No share is above 1 except by rounding: no logit is above the maximum,
// and the sum holds the pair's own term.
template <typename T, typename number_t>
PGLCL_DEVICE number_t pair_weight(const ContrastArguments<T>& x, const PairKind& kind,
                                  const AnchorTerms<number_t>& terms, number_t dot) {
  const number_t below = minimum(pair_logit(x, dot) - terms.max_logit, number_t(0));
  number_t share = power2(multiply_add(below, number_t(kLog2E), kind.positive ? -terms.log_sum : -terms.log_negative));
  if (kind.positive && kind.negative) share += power2(multiply_add(below, number_t(kLog2E), -terms.log_negative));
  // An infinite dot times 0 is NaN. So is then the gradient of the rows that use the pair.
  const number_t rest = multiply_add(dot, number_t(0), kind.positive ? -terms.mean : number_t(0));
  const number_t weight = multiply_add(terms.coefficient, share, rest);
  return kind.positive || kind.negative ? weight : number_t(0);
}

template <typename number_t, typename T>
PGLCL_DEVICE number_t warp_dot(Global<const T> a, int64_t i, Global<const T> b, int64_t j, int64_t depth) {
  number_t sum = 0;
  for (int64_t d = thread_index() % 32; d < depth; d += 32)
    sum += number_t(widen(a.load(i * depth + d))) * number_t(widen(b.load(j * depth + d)));
  return warp_sum(sum);
}

// --- one row at a time, by a warp: in the type of T for the plain kernels, in float64 for wide anchors ---------------

constexpr int kPlainGroup = 64;  // keys that are summed by themselves, as RunningSums::add() does with its pairs

// The sums of anchor i over all keys.
template <typename number_t, typename T>
PGLCL_DEVICE RunningSums<number_t> sum_over_keys(const ContrastArguments<T>& x, int64_t i) {
  using scalar_t = typename Accumulate<T>::type;
  const Patch<scalar_t> anchor = load_patch(x, i, true);
  const AnchorTerms<number_t> terms = load_terms<T, number_t>(x, i, anchor);
  RunningSums<number_t> sums, of_group;  // of all keys, and of the last ones
  for (int64_t j = 0; j < x.m; ++j) {
    if (j % kPlainGroup == 0) {
      sums.merge(of_group);
      of_group = {};
    }
    const PairKind kind = pair_kind(x, i, anchor, j, load_patch(x, j, false), terms);
    of_group.undecided = of_group.undecided || kind.undecided;
    if (!kind.positive && !kind.negative) continue;  // the same in all lanes
    const number_t dot = warp_dot<number_t, T>(x.anchors, i, x.keys, j, x.depth);
    of_group.add({pair_logit(x, dot)}, kind.positive, kind.negative);
  }
  sums.merge(of_group);
  return sums;
}

constexpr int kPlainDepth = 512;  // columns of the gradient summed at once: 4 warps x 512 x 8 bytes = 16 KiB

// Sums a row of the gradient over the anchors whose sums are of number_t. own_anchor: the row is an anchor and meets
// every key. own_key: it is a key and meets every anchor. Both hold when the anchors are the keys. A sum begins with
// begin(place), contains weights times root^2, and is handed to end(place, sum).
template <typename number_t, typename T, typename Begin, typename End>
PGLCL_DEVICE void sum_gradient_row(const ContrastArguments<T>& x,
                                   const ContrastGradients<typename Accumulate<T>::type>& g, number_t root, int64_t row,
                                   bool own_anchor, bool own_key, const Shared<number_t>& sums, Begin begin, End end) {
  using scalar_t = typename Accumulate<T>::type;
  const int at = thread_index() / 32 * kPlainDepth, lane = thread_index() % 32;
  const Global<const T> own_rows(own_anchor ? x.anchors : x.keys), other_rows(own_anchor ? x.keys : x.anchors);
  const int64_t others = own_anchor ? x.m : x.n;
  const Patch<scalar_t> own = load_patch(x, row, own_anchor);
  const AnchorTerms<number_t> own_terms =
      own_anchor ? load_terms<T, number_t>(x, g, root, row, own) : no_terms<T, number_t>();
  const number_t unknown = own_terms.log_sum != own_terms.log_sum ? number_t(NAN) : number_t(0);

  for (int64_t first = 0; first < x.depth; first += kPlainDepth) {
    const int64_t width = x.depth - first < kPlainDepth ? x.depth - first : kPlainDepth;
    const int64_t place = row * x.depth + first;
    for (int64_t d = lane; d < width; d += 32) sums.store(at + d, begin(place + d) + unknown);
    for (int64_t j = 0; j < others; ++j) {
      const Patch<scalar_t> other = load_patch(x, j, !own_anchor);
      const AnchorTerms<number_t> other_terms =
          own_key ? load_terms<T, number_t>(x, g, root, j, other) : no_terms<T, number_t>();
      PairKind as_anchor{}, as_key{};
      if (own_anchor) as_anchor = pair_kind(x, row, own, j, other, own_terms);
      if (own_key) as_key = pair_kind(x, j, other, row, own, other_terms);
      if (!as_anchor.positive && !as_anchor.negative && !as_key.positive && !as_key.negative) continue;
      const number_t dot = warp_dot<number_t, T>(own_rows, row, other_rows, j, x.depth);
      const number_t weight = pair_weight(x, as_anchor, own_terms, dot) + pair_weight(x, as_key, other_terms, dot);
      for (int64_t d = lane; d < width; d += 32)
        sums.store(at + d, sums.load(at + d) + weight * number_t(widen(other_rows.load(j * x.depth + first + d))));
    }
    for (int64_t d = lane; d < width; d += 32) end(place + d, sums.load(at + d));
  }
}

// --- the plain kernels: a warp for each row
// ---------------------------------------------------------------------------

template <typename T>
PGLCL_KERNEL contrast_forward_plain(ContrastArguments<T> x, ContrastSums<typename Accumulate<T>::type> out) {
  using scalar_t = typename Accumulate<T>::type;
  const int64_t i = int64_t(block_index()) * (kContrastThreads / 32) + thread_index() / 32;
  if (i >= x.n) return;  // the whole warp
  const RunningSums<scalar_t> sums = sum_over_keys<scalar_t>(x, i);
  if (thread_index() % 32 == 0) sums.write(i, x.log_weight, out);
}

template <typename T>
PGLCL_KERNEL contrast_backward_plain(ContrastArguments<T> x, ContrastGradients<typename Accumulate<T>::type> g,
                                     T* grad_data, bool own_anchor, bool own_key) {
  using scalar_t = typename Accumulate<T>::type;
  SharedMemory memory;
  const Shared<scalar_t> sums = memory.take<scalar_t>(kContrastThreads / 32 * kPlainDepth);
  const WeightScale<scalar_t> scale(memory);
  scale.find(x, g);
  const int64_t row = int64_t(block_index()) * (kContrastThreads / 32) + thread_index() / 32;
  if (row >= (own_anchor ? x.n : x.m)) return;  // the whole warp
  const Global<T> grad(grad_data);
  sum_gradient_row(
      x, g, scale.root(), row, own_anchor, own_key, sums, [](int64_t) { return scalar_t(0); },
      [&](int64_t place, scalar_t sum) { grad.store(place, narrow<T>(times_square(sum, scale.inverse_root()))); });
}

// --- the end of each pass, for float32 and 16-bit types: parts are merged, and wide anchors take their share ---------

// Where there are too few rows to keep the GPU busy, several blocks of the same rows share the keys. Each leaves its
// part of an anchor's sums here, and contrast_finish merges the parts in a fixed order. The arrays are (count, n).
struct ContrastParts {
  float *highest, *sum, *negative_sum, *spread;
  int32_t *positives, *undecided;
  int64_t n;
  int count;

  PGLCL_DEVICE void store(int part, int64_t i, const RunningSums<float>& sums) const {
    const int64_t at = part * n + i;
    Global<float>(highest).store(at, sums.highest);
    Global<float>(sum).store(at, sums.sum);
    Global<float>(negative_sum).store(at, sums.negative_sum);
    Global<float>(spread).store(at, sums.spread);
    Global<int32_t>(positives).store(at, sums.positives);
    Global<int32_t>(undecided).store(at, sums.undecided);
  }
  PGLCL_DEVICE RunningSums<float> load(int part, int64_t i) const {
    const int64_t at = part * n + i;
    RunningSums<float> sums;
    sums.highest = Global<const float>(highest).load(at);
    sums.sum = Global<const float>(sum).load(at);
    sums.negative_sum = Global<const float>(negative_sum).load(at);
    sums.spread = Global<const float>(spread).load(at);
    sums.positives = Global<const int32_t>(positives).load(at);
    sums.undecided = Global<const int32_t>(undecided).load(at) != 0;
    return sums;
  }
};

// A workspace for the parts holds contrast_parts_size(count, n) numbers: none if there is one part.
constexpr int64_t contrast_parts_size(int count, int64_t n) { return count > 1 ? 6 * n * count : 0; }
inline ContrastParts contrast_parts(float* workspace, int count, int64_t n) {
  const int64_t each = count > 1 ? count * n : 0;
  const auto integers = [&](int k) { return reinterpret_cast<int32_t*>(workspace + k * each); };
  return {workspace, workspace + each, workspace + 2 * each, workspace + 3 * each, integers(4), integers(5), n, count};
}

// A share below 2^-126 of an anchor's largest one is lost in float32. With a weight that is far from 1, such a share
// may be most of the sum. Up to this |log(negative_weight)|, a billion of them are too small to be seen.
constexpr float kMostLogWeight = 50;
template <typename T>
PGLCL_DEVICE bool loses_shares(const ContrastArguments<T>& x) {
  const float size = absolute(x.log_weight);
  return size > kMostLogWeight && size < INFINITY;  // a weight of 0 loses nothing
}

// One thread per anchor. If a loss is not finite although it is known which pairs count, or if float32 loses shares,
// the thread's warp computes it again in float64. If it is NaN then, too, an input was not finite, and the result stays
// as it is.
template <typename T>
PGLCL_KERNEL contrast_finish(ContrastArguments<T> x, ContrastParts parts, ContrastSums<float> out) {
  const int64_t i = int64_t(block_index()) * kContrastThreads + thread_index();
  bool again = false;
  if (i < x.n) {
    if (parts.count > 1) {
      RunningSums<float> sums = parts.load(0, i);
      for (int part = 1; part < parts.count; ++part) sums.merge(parts.load(part, i));
      sums.write(i, x.log_weight, out);
    }
    const float loss = Global<const float>(out.losses).load(i);
    const double max_logit = Global<const double>(out.max_logit).load(i);
    again = (loss - loss != 0 || loses_shares(x)) && max_logit == max_logit;
  }
  const uint32_t wide = ballot(again);
  sync_warp();
  for (int lane = 0; lane < 32; ++lane) {
    if ((wide >> lane & 1) == 0) continue;
    const int64_t anchor = i - thread_index() % 32 + lane;
    const RunningSums<double> sums = sum_over_keys<double>(x, anchor);
    if (thread_index() % 32 == 0 && sums.is_number()) sums.write(anchor, x.exact_log_weight, out);
  }
}

// Several blocks of the same rows may share the columns, as in the forward pass. Each leaves its sums, of scaled
// weights (WeightScale), in a part of its own, and contrast_finish_gradients adds the parts in a fixed order.
template <typename T>
struct GradientParts {
  float* sums;   // (count, rows, depth); not used if there is one part
  T* gradient;   // (rows, depth)
  int64_t size;  // of the gradient; 0 if it is not needed
  int count;
};

// Rows of a block of contrast_finish_gradients: few where parts are added, many where it only looks for wide anchors.
constexpr int kRowsOfParts = 8, kRowsToFinish = 64;

// The block's index in y tells whose rows it has: 0 the anchors' and 1 the keys', or 0 those of the only gradient that
// is needed. symmetric: the anchors are the keys.
template <typename T>
PGLCL_KERNEL contrast_finish_gradients(ContrastArguments<T> x, ContrastGradients<float> g, GradientParts<T> of_anchors,
                                       GradientParts<T> of_keys, bool symmetric, int rows_per_block) {
  SharedMemory memory;
  const Shared<double> double_sums = memory.take<double>(kContrastThreads / 32 * kPlainDepth);
  const WeightScale<float> scale(memory);
  PGLCL_STATIC_SHARED(uint32_t, met, kContrastThreads / 32);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  bool mine = false;
  for (int64_t i = thread_index(); i < x.n; i += kContrastThreads)
    mine = mine || is_wide(Global<const double>(g.max_logit).load(i));
  const uint32_t votes = ballot(mine);
  if (lane == 0) met.store(warp, votes);
  sync_threads();
  bool any_wide = false;  // whether any anchor is wide
  for (int w = 0; w < kContrastThreads / 32; ++w) any_wide = any_wide || met.load(w) != 0;

  const bool own_anchor = of_anchors.size > 0 && block_index_y() == 0;
  const int count = own_anchor ? of_anchors.count : of_keys.count;
  const int64_t rows = own_anchor ? x.n : x.m, size = rows * x.depth;
  if (count > 1) scale.find(x, g);
  const Global<const float> sums(own_anchor ? of_anchors.sums : of_keys.sums);
  const Global<T> grad(own_anchor ? of_anchors.gradient : of_keys.gradient);
  const auto end = [&](int64_t place, double sum) { grad.store(place, narrow<T>(float(sum))); };
  for (int r = warp; r < rows_per_block; r += kContrastThreads / 32) {
    const int64_t row = int64_t(block_index()) * rows_per_block + r;
    if (row >= rows) break;  // the whole warp
    if (count > 1)
      for (int64_t at = row * x.depth + lane; at < (row + 1) * x.depth; at += 32) {
        float total = sums.load(at);
        for (int part = 1; part < count; ++part) total += sums.load(part * size + at);
        grad.store(at, narrow<T>(times_square(total, scale.inverse_root())));
      }
    if (any_wide)
      sum_gradient_row(
          x, g, 1.0, row, own_anchor, symmetric || !own_anchor, double_sums,
          [&](int64_t place) { return double(widen(grad.load(place))); }, end);
  }
}

constexpr int kReduceThreads = 256;

// The mean or sum of the anchors' losses, which one block adds in a fixed order. result: one number; null if the losses
// themselves are the result.
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
