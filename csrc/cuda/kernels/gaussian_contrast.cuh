// The Gaussian contrastive loss on the GPU (method, section 6). The forward pass also computes the gradient.
#pragma once

#include "patch_contrast.cuh"

namespace pglcl::cuda {

// The threads of a block share the columns of T S, where T are its anchors and S is a covariance. Eight anchors share
// the reads of S: at D = 128 these are 64 KiB from the L2 cache for 8 x 128 x 128 multiply-adds, which keeps the
// arithmetic ahead.
constexpr int kGaussianThreads = 128;
constexpr int kGaussianAnchors = 8;

template <typename T>
struct GaussianArguments {
  using scalar_t = typename Accumulate<T>::type;
  const T* anchors;  // (N, depth)
  int64_t n, depth, classes;
  const int64_t* labels;        // (N,)
  const int64_t* order;         // (N,): anchors of one class together; null: the given order
  const scalar_t* means;        // (classes, depth), or (classes, classes, depth) when pairwise
  const scalar_t* covariances;  // (classes, depth, depth), symmetric, or (classes, classes, depth, depth)
  const int64_t* counts;        // (classes,)
  bool pairwise;
  int64_t ignore_index;
};

// Numbers of the formula, in the type that sums are kept in.
template <typename number_t>
struct GaussianNumbers {
  number_t inverse_temperature;
  number_t spread;                // covariance_scale / temperature^2
  number_t log2_negative_weight;  // not yet divided by the number of classes that take part

  template <typename other_t>
  GaussianNumbers<other_t> as() const {
    return {other_t(inverse_temperature), other_t(spread), other_t(log2_negative_weight)};
  }
};

// The sums of kAnchors anchors so far: sum is that of 2^(exponent - shift), shift the largest exponent.
template <typename number_t, int kAnchors>
struct GaussianState {
  number_t shift[kAnchors], sum[kAnchors], own_logit[kAnchors];
};

// Component e of all anchors of a block: they lie side by side.
template <typename number_t, int kAnchors>
PGLCL_DEVICE void load_anchors(const Shared<number_t>& anchors, int e, number_t (&out)[kAnchors]) {
  constexpr int kVector = kAnchors > 1 ? 16 / sizeof(number_t) : 1;
#pragma unroll
  for (int v = 0; v < kAnchors; v += kVector) {
    const Vector<number_t, kVector> part = anchors.template load_vector<kVector>(e * kAnchors + v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[v + i] = part.at[i];
  }
}

// Adds class j of the table to the state of the block's anchors and to their gradients. Every thread keeps the same
// state: it is computed from sums in shared memory, in one order.
template <typename T, typename number_t, int kAnchors>
PGLCL_DEVICE void add_gaussian(const GaussianArguments<T>& x, const GaussianNumbers<number_t>& numbers, int64_t j,
                               int rows, const int64_t (&own)[kAnchors], number_t log2_weight, bool wanted,
                               const Shared<number_t>& anchors, const Shared<number_t>& products,
                               const Shared<number_t>& gradients, const Shared<number_t>& partial,
                               GaussianState<number_t, kAnchors>& state) {
  using scalar_t = typename Accumulate<T>::type;
  const Global<const scalar_t> means(x.means), covariances(x.covariances);
  const int depth = int(x.depth), thread = thread_index();
  number_t of_mean[kAnchors], of_product[kAnchors];
  int64_t table[kAnchors];
#pragma unroll
  for (int r = 0; r < kAnchors; ++r) {
    of_mean[r] = of_product[r] = 0;
    // An anchor that does not count takes its neighbour's table, so that it does not make one_table false.
    table[r] = !x.pairwise ? j : own[r] >= 0 ? own[r] * x.classes + j : r > 0 ? table[r - 1] : j;
  }
  bool one_table = true;  // the same in all threads
#pragma unroll
  for (int r = 1; r < kAnchors; ++r) one_table = one_table && (r >= rows || table[r] == table[0]);
  for (int d = thread; d < depth; d += kGaussianThreads) {
    number_t sum[kAnchors] = {};
    if (one_table) {
      int64_t at = table[0] * depth * depth + d;
#pragma unroll 4
      for (int e = 0; e < depth; ++e, at += depth) {
        const number_t s = covariances.load(at);
        number_t t[kAnchors];
        load_anchors(anchors, e, t);
#pragma unroll
        for (int r = 0; r < kAnchors; ++r) sum[r] += t[r] * s;
      }
    } else {
#pragma unroll
      for (int r = 0; r < kAnchors; ++r) {
        if (r >= rows) break;
        int64_t at = table[r] * depth * depth + d;
        for (int e = 0; e < depth; ++e, at += depth)
          sum[r] += anchors.load(e * kAnchors + r) * number_t(covariances.load(at));
      }
    }
    number_t own_column[kAnchors];
    load_anchors(anchors, d, own_column);
#pragma unroll
    for (int r = 0; r < kAnchors; ++r) {
      if (r >= rows) break;
      products.store(r * depth + d, sum[r]);
      of_product[r] += own_column[r] * sum[r];
      of_mean[r] += own_column[r] * number_t(means.load(table[r] * depth + d));
    }
  }
#pragma unroll
  for (int r = 0; r < kAnchors; ++r) {
    const number_t mean = warp_sum(of_mean[r]), product = warp_sum(of_product[r]);
    if (thread % 32 == 0) {
      partial.store((thread / 32 * kAnchors + r) * 2, mean);
      partial.store((thread / 32 * kAnchors + r) * 2 + 1, product);
    }
  }
  sync_threads();
#pragma unroll
  for (int r = 0; r < kAnchors; ++r) {
    if (r >= rows) break;
    number_t mean = 0, product = 0;
    for (int warp = 0; warp < kGaussianThreads / 32; ++warp) {
      mean += partial.load((warp * kAnchors + r) * 2);
      product += partial.load((warp * kAnchors + r) * 2 + 1);
    }
    const number_t logit = mean * numbers.inverse_temperature;
    number_t exponent = number_t(kLog2E) * (logit + number_t(0.5) * numbers.spread * product);
    if (j == own[r]) {
      state.own_logit[r] = logit;
    } else {
      exponent += log2_weight;
    }
    // With a weight of 0, the exponent of the first class may be minus infinity like the shift. It adds nothing.
    const bool counts = own[r] >= 0 && (j == own[r] || log2_weight != -number_t(INFINITY));
    if (!counts) continue;
    const number_t shift = exponent > state.shift[r] ? exponent : state.shift[r];
    // An exponent of minus infinity may be a sum of which only a part left the range. The loss is NaN then.
    const number_t keep = power2(state.shift[r] - shift), weight = power2(exponent - shift) + (exponent - exponent);
    state.shift[r] = shift;
    state.sum[r] = state.sum[r] * keep + weight;
    if (!wanted) continue;
    for (int d = thread; d < depth; d += kGaussianThreads) {
      const number_t step = numbers.inverse_temperature * number_t(means.load(table[r] * depth + d)) +
                            numbers.spread * products.load(r * depth + d);
      gradients.store(r * depth + d, keep * gradients.load(r * depth + d) + weight * step);
    }
  }
  sync_threads();  // the next class writes `partial` again
}

// losses and counts (N,) are what contrast_reduce sums; gradients (N, depth), or null.
template <typename T>
struct GaussianOutputs {
  using scalar_t = typename Accumulate<T>::type;
  scalar_t* losses;
  int32_t* counts;
  scalar_t* gradients;

  // Whether a result of this anchor is not finite, because float32 had no room for it. All threads of the block call
  // it. `flags`: one per warp.
  PGLCL_DEVICE bool unfinished(int64_t row, int64_t depth, const Shared<int>& flags) const {
    const scalar_t loss = Global<const scalar_t>(losses).load(row);
    bool finite = loss - loss == 0;
    if (gradients)
      for (int64_t d = thread_index(); d < depth; d += kGaussianThreads) {
        const scalar_t value = Global<const scalar_t>(gradients).load(row * depth + d);
        finite = finite && value - value == 0;
      }
    const uint32_t votes = ballot(!finite);
    if (thread_index() % 32 == 0) flags.store(thread_index() / 32, votes != 0);
    sync_threads();
    bool any = false;
    for (int warp = 0; warp < kGaussianThreads / 32; ++warp) any = any || flags.load(warp) != 0;
    return any;
  }
};

// A block has rows_per_block anchors, at most kAnchors, as many as fit its shared memory. Sums are kept in number_t. If
// it is float64 and the results are float32, anchors whose results are finite already are left alone.
template <typename T, typename number_t, int kAnchors>
PGLCL_KERNEL gaussian_contrast_rows(const GaussianArguments<T> x, const GaussianNumbers<number_t> numbers,
                                    GaussianOutputs<T> out, int rows_per_block) {
  using scalar_t = typename Accumulate<T>::type;
  const int depth = int(x.depth), thread = thread_index();
  SharedMemory memory;
  const Shared<number_t> anchors = memory.take<number_t>(kAnchors * depth);
  const Shared<number_t> products = memory.take<number_t>(rows_per_block * depth);
  const Shared<number_t> gradients = memory.take<number_t>(rows_per_block * depth);
  const Shared<number_t> partial = memory.take<number_t>(kGaussianThreads / 32 * kAnchors * 2);
  const Shared<int> flags = memory.take<int>(kGaussianThreads / 32);
  const Global<const int64_t> labels(x.labels), counts(x.counts);
  const int64_t first = int64_t(block_index()) * rows_per_block;
  const int rows = int(x.n - first < rows_per_block ? x.n - first : rows_per_block);
  if constexpr (kWide<T, number_t>)
    if (!out.unfinished(x.order ? Global<const int64_t>(x.order).load(first) : first, depth, flags)) return;

  // Load the anchors, and the class of each: -1 where it does not count.
  int64_t row[kAnchors], own[kAnchors];
  GaussianState<number_t, kAnchors> state;
#pragma unroll
  for (int r = 0; r < kAnchors; ++r) {
    own[r] = -1;
    row[r] = 0;
    state.shift[r] = -number_t(INFINITY);
    state.sum[r] = state.own_logit[r] = 0;
    if (r < rows) {
      row[r] = x.order ? Global<const int64_t>(x.order).load(first + r) : first + r;
      const int64_t label = labels.load(row[r]);
      if (label != x.ignore_index && label >= 0 && label < x.classes && counts.load(label) > 0) own[r] = label;
    }
    for (int d = thread; d < depth; d += kGaussianThreads) {
      const bool there = r < rows;
      anchors.store(d * kAnchors + r,
                    there ? number_t(widen(Global<const T>(x.anchors).load(row[r] * depth + d))) : number_t(0));
      if (there) gradients.store(r * depth + d, 0);
    }
  }
  int taking_part = 0;
  for (int64_t k = 0; k < x.classes; ++k) taking_part += counts.load(k) > 0;
  const number_t log2_weight = numbers.log2_negative_weight - logarithm2(number_t(taking_part));
  sync_threads();

  for (int64_t j = 0; j < x.classes; ++j)
    if (counts.load(j) > 0)
      add_gaussian<T, number_t, kAnchors>(x, numbers, j, rows, own, log2_weight, out.gradients != nullptr, anchors,
                                          products, gradients, partial, state);

#pragma unroll
  for (int r = 0; r < kAnchors; ++r) {
    if (r >= rows) break;
    const bool valid = own[r] >= 0;
    if (thread == 0) {
      const number_t ln2 = number_t(1 / kLog2E);
      const number_t log_sum = (state.shift[r] + logarithm2(state.sum[r])) * ln2;
      Global<scalar_t>(out.losses).store(row[r], valid ? scalar_t(log_sum - state.own_logit[r]) : scalar_t(0));
      Global<int32_t>(out.counts).store(row[r], valid);
    }
    if (!out.gradients) continue;
    const Global<const scalar_t> means(x.means);
    for (int d = thread; d < depth; d += kGaussianThreads) {
      number_t value = 0;
      if (valid) {
        const int64_t table = x.pairwise ? own[r] * x.classes + own[r] : own[r];
        value = gradients.load(r * depth + d) / state.sum[r] -
                numbers.inverse_temperature * number_t(means.load(table * depth + d));
      }
      Global<scalar_t>(out.gradients).store(row[r] * depth + d, scalar_t(value));
    }
  }
}

// Only the symmetric part of a matrix has a quadratic form: half the sum of it and its transpose.
template <typename scalar_t>
PGLCL_KERNEL symmetric_part(const scalar_t* from_data, scalar_t* to_data, int64_t count, int64_t depth) {
  const Global<const scalar_t> from(from_data);
  const Global<scalar_t> to(to_data);
  const int64_t at = int64_t(block_index()) * kGaussianThreads + thread_index();
  if (at >= count * depth * depth) return;
  const int64_t row = at / depth, column = at - row * depth, matrix = row / depth;
  const int64_t mirrored = (matrix * depth + column) * depth + (row - matrix * depth);
  to.store(at, from.load(at) / scalar_t(2) + from.load(mirrored) / scalar_t(2));  // their sum may leave the range
}

// The symmetric parts of `count` matrices (depth, depth).
template <typename scalar_t>
void run_symmetric_part(const scalar_t* from, scalar_t* to, int64_t count, int64_t depth, PglclStream stream) {
  const int64_t blocks = (count * depth * depth + kGaussianThreads - 1) / kGaussianThreads;
  if (blocks == 0) return;
  PGLCL_LAUNCH(symmetric_part<scalar_t>, blocks, 1, kGaussianThreads, 0, stream, from, to, count, depth);
}

// Bytes of shared memory that `rows` of a block's kAnchors anchors take.
template <typename number_t, int kAnchors>
int64_t gaussian_shared_bytes(int rows, int64_t depth) {
  return (kAnchors * depth * int64_t(sizeof(number_t)) + 15) / 16 * 16 +
         2 * ((rows * depth * int64_t(sizeof(number_t)) + 15) / 16 * 16) +
         kGaussianThreads / 32 * int64_t(sizeof(int)) +
         kGaussianThreads / 32 * kAnchors * 2 * int64_t(sizeof(number_t));
}

// The anchors that a block can hold; 0 if the rows are too long for the device.
template <typename scalar_t>
int gaussian_rows_per_block(int64_t depth, int64_t shared_bytes) {
  int rows = kGaussianAnchors;
  while (rows > 0 && gaussian_shared_bytes<scalar_t, kGaussianAnchors>(rows, depth) > shared_bytes) --rows;
  return rows;
}

template <typename number_t, int kAnchors, typename T>
void launch_gaussian_rows(const GaussianArguments<T>& x, const GaussianNumbers<double>& numbers, int rows,
                          int64_t shared_bytes, const GaussianOutputs<T>& out, PglclStream stream) {
  const int64_t bytes = gaussian_shared_bytes<number_t, kAnchors>(rows, x.depth);
  PGLCL_ALLOW_SHARED((gaussian_contrast_rows<T, number_t, kAnchors>), bytes, shared_bytes);
  PGLCL_LAUNCH((gaussian_contrast_rows<T, number_t, kAnchors>), (x.n + rows - 1) / rows, 1, kGaussianThreads, bytes,
               stream, x, numbers.template as<number_t>(), out, rows);
}

// loss: one number; null if the losses of `out` are the result.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_gaussian_contrast(const GaussianArguments<T>& x, const GaussianNumbers<double>& numbers, int64_t shared_bytes,
                           const GaussianOutputs<T>& out, bool mean, scalar_t* loss, int64_t* num_valid,
                           PglclStream stream) {
  if (x.n > 0) {
    const int rows = gaussian_rows_per_block<scalar_t>(x.depth, shared_bytes);
    launch_gaussian_rows<scalar_t, kGaussianAnchors>(x, numbers, rows, shared_bytes, out, stream);
    if constexpr (sizeof(T) < 8) launch_gaussian_rows<double, 1>(x, numbers, 1, shared_bytes, out, stream);
  }
  PGLCL_LAUNCH(contrast_reduce<scalar_t>, 1, 1, kReduceThreads, 0, stream, out.losses, out.counts, x.n, mean, loss,
               num_valid);
}

}  // namespace pglcl::cuda
