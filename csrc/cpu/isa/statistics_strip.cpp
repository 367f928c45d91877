// Arithmetic of one strip of image rows of the patch statistics (method, section 2), compiled once per instruction set.
//
// Both passes walk down a strip one vector of columns at a time, with what belongs to these columns in registers. The
// number of classes is a template argument for the common ones (kClasses = 0: any number, in scratch memory).
#include "statistics_strip.h"

#include "kernel_table.h"
#include "simd.h"

namespace pglcl::PGLCL_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Two to this is 0. The distance of two logits may be infinite, and 0 times infinity is NaN: it ends here.
template <typename scalar_t>
constexpr scalar_t kLowestExponent = sizeof(scalar_t) == 4 ? -256 : -2048;

// p log p with 0 log 0 = 0. A NaN fails the comparison and keeps its own value.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> p_log_p(vec_t<scalar_t> p) {
  return p <= scalar_t(0) ? vec_t<scalar_t>{} : p * log(p);
}

// The entropy of one vector of pixels, and for logits the highest and the log of the sum of exponentials above it. The
// two stay apart: their rounded sum would be off by as much as the logits are large.
template <typename scalar_t>
struct Prediction {
  vec_t<scalar_t> entropy;
  vec_t<scalar_t> highest;
  vec_t<scalar_t> log_sum;
};

// p[k] = probability of class k; kClasses > 0 lets the compiler keep p in registers.
template <typename scalar_t, int kClasses, typename P>
PGLCL_INLINE Prediction<scalar_t> predict(const scalar_t* input, int64_t class_stride, int64_t classes,
                                          bool probabilities, P& p) {
  using vec = vec_t<scalar_t>;
  const int64_t count = kClasses > 0 ? kClasses : classes;
  Prediction<scalar_t> result{};
  if (probabilities) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) {
      p[k] = load(input + k * class_stride);
      result.entropy -= p_log_p<scalar_t>(p[k]);
    }
    return result;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) p[k] = load(input + k * class_stride);
  vec highest = p[0];
#pragma GCC unroll 4
  for (int64_t k = 1; k < count; ++k) highest = maximum<scalar_t>(highest, p[k]);
  vec sum{}, weighted{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    // In units of log 2, so that 2^x replaces e^x.
    const vec exponent = at_least((p[k] - highest) * scalar_t(kLog2E), kLowestExponent<scalar_t>);
    const vec e = exp2_to_zero(exponent);
    sum += e;
    weighted += e * exponent;
    p[k] = e;
  }
  const vec inverse = scalar_t(1) / sum;
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) p[k] *= inverse;
  const vec log_sum = log_of_normal(sum);
  // Rounding can leave a certain pixel a little below zero.
  result.entropy = at_least(log_sum - weighted * inverse * scalar_t(kLn2), scalar_t(0));
  result.highest = highest;
  result.log_sum = log_sum;
  return result;
}

template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> load_part(const scalar_t* in, int lanes) {
  if (lanes == Simd<scalar_t>::kLanes) return load(in);
  vec_t<scalar_t> value{};
  for (int i = 0; i < lanes; ++i) value[i] = in[i];
  return value;
}

template <typename scalar_t>
PGLCL_INLINE void store_part(scalar_t* out, vec_t<scalar_t> value, int lanes) {
  if (lanes == Simd<scalar_t>::kLanes) {
    store(out, value);
  } else {
    for (int i = 0; i < lanes; ++i) out[i] = value[i];
  }
}

// The last columns of a row, fewer than a vector: all classes copied to `edge` (classes, lanes), the last one repeated.
template <typename scalar_t>
void copy_edge(const scalar_t* input, int64_t class_stride, int64_t classes, int lanes, scalar_t* edge) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  for (int64_t k = 0; k < classes; ++k)
    for (int i = 0; i < kLanes; ++i) edge[k * kLanes + i] = input[k * class_stride + (i < lanes ? i : lanes - 1)];
}

// Walking down a strip defeats the hardware's prefetching along rows: ask for the next columns of this row, which are
// wanted a strip's height from now.
template <typename scalar_t>
PGLCL_INLINE void prefetch_next_columns(const scalar_t* input, int64_t class_stride, int64_t classes) {
  for (int64_t k = 0; k < classes; ++k) __builtin_prefetch(input + k * class_stride + 2 * Simd<scalar_t>::kLanes);
}

// Where one vector of columns of a row is read: in place, or for the ragged end from a copy in scratch memory.
template <int kClasses, template <typename> class Strip, typename scalar_t>
PGLCL_INLINE const scalar_t* columns_of(const Strip<scalar_t>& s, int64_t row, int64_t x, int lanes,
                                        int64_t& class_stride) {
  const scalar_t* input = s.input + row * s.row_stride + x;
  class_stride = s.class_stride;
  prefetch_next_columns(input, class_stride, kClasses > 0 ? kClasses : s.classes);
  if (lanes == Simd<scalar_t>::kLanes) return input;
  scalar_t* edge = s.scratch + s.classes * kMaxLanes;
  copy_edge(input, class_stride, s.classes, lanes, edge);
  class_stride = Simd<scalar_t>::kLanes;
  return edge;
}

// p of any number of classes lives in scratch memory, that of a few in registers.
template <typename scalar_t, int kClasses>
struct Probabilities {
  vec_t<scalar_t> p[kClasses];
  explicit Probabilities(scalar_t*) {}
  PGLCL_INLINE vec_t<scalar_t>& operator[](int64_t k) { return p[k]; }
};
template <typename scalar_t>
struct Probabilities<scalar_t, 0> {
  typename Simd<scalar_t>::vec_unaligned* p;
  explicit Probabilities(scalar_t* scratch) : p(reinterpret_cast<typename Simd<scalar_t>::vec_unaligned*>(scratch)) {}
  PGLCL_INLINE typename Simd<scalar_t>::vec_unaligned& operator[](int64_t k) { return p[k]; }
};

template <typename scalar_t, int kClasses>
PGLCL_INLINE void forward_columns(const StatisticsStrip<scalar_t>& s, int64_t x, int lanes) {
  using vec = vec_t<scalar_t>;
  Probabilities<scalar_t, kClasses> p(s.scratch);
  vec entropy = load_part<scalar_t>(s.entropy + x, lanes);
  constexpr int kHeld = kClasses > 0 ? kClasses : 1;
  vec mass[kHeld] = {}, product[kHeld] = {};
  for (int64_t r = 0; r < s.rows; ++r) {
    int64_t class_stride;
    const scalar_t* input = columns_of<kClasses>(s, r, x, lanes, class_stride);
    const vec h = predict<scalar_t, kClasses>(input, class_stride, s.classes, s.probabilities, p).entropy;
    entropy += h;
    if constexpr (kClasses > 0) {
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k) {
        mass[k] += p[k];
        product[k] += p[k] * h;
      }
    } else {
      for (int64_t k = 0; k < s.classes; ++k) {
        scalar_t* m = s.mass + k * s.width + x;
        scalar_t* q = s.product + k * s.width + x;
        const vec pk = p[k];
        store_part<scalar_t>(m, load_part<scalar_t>(m, lanes) + pk, lanes);
        store_part<scalar_t>(q, load_part<scalar_t>(q, lanes) + pk * h, lanes);
      }
    }
  }
  store_part<scalar_t>(s.entropy + x, entropy, lanes);
  if constexpr (kClasses > 0) {
#pragma GCC unroll 4
    for (int k = 0; k < kClasses; ++k) {
      scalar_t* m = s.mass + k * s.width + x;
      scalar_t* q = s.product + k * s.width + x;
      store_part<scalar_t>(m, load_part<scalar_t>(m, lanes) + mass[k], lanes);
      store_part<scalar_t>(q, load_part<scalar_t>(q, lanes) + product[k], lanes);
    }
  }
}

template <typename scalar_t, int kClasses>
PGLCL_INLINE void backward_columns(const StatisticsGradientStrip<scalar_t>& s, int64_t x, int lanes) {
  using vec = vec_t<scalar_t>;
  const int64_t classes = kClasses > 0 ? kClasses : s.classes;
  Probabilities<scalar_t, kClasses> p(s.scratch);
  const vec alpha = load_part<scalar_t>(s.alpha + x, lanes);
  for (int64_t r = 0; r < s.rows; ++r) {
    int64_t class_stride;
    const scalar_t* input = columns_of<kClasses>(s, r, x, lanes, class_stride);
    const Prediction<scalar_t> prediction =
        predict<scalar_t, kClasses>(input, class_stride, s.classes, s.probabilities, p);
    const vec h = prediction.entropy;
    // dL/dh(x), and the mean over classes of dL/dp_k(x) with h held fixed.
    vec dh = alpha, dp_mean{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < classes; ++k) {
      const vec gamma = load_part<scalar_t>(s.gamma + k * s.width + x, lanes);
      const vec beta = load_part<scalar_t>(s.beta + k * s.width + x, lanes);
      dh += gamma * p[k];
      dp_mean += (beta + gamma * h) * p[k];
    }
    scalar_t* out = s.grad_input + r * s.grad_row_stride + x;
#pragma GCC unroll 4
    for (int64_t k = 0; k < classes; ++k) {
      const vec gamma = load_part<scalar_t>(s.gamma + k * s.width + x, lanes);
      const vec beta = load_part<scalar_t>(s.beta + k * s.width + x, lanes);
      const vec dp = beta + gamma * h;
      vec gradient;
      if (s.probabilities) {
        // dh/dp = -(log p + 1); its value at p = 0, where it is infinite, is taken as 0.
        const vec pk = p[k];
        const vec slope = pk <= scalar_t(0) ? vec{} : -(log(pk) + scalar_t(1));
        gradient = dp + dh * slope;
      } else {
        // dh/dlogit_k = -p_k (log p_k + h), and the softmax Jacobian for dp.
        const vec centred = load(input + k * class_stride) - prediction.highest;
        const vec log_pk = at_least(centred, kLowestExponent<scalar_t>) - prediction.log_sum;
        gradient = p[k] * (dp - dp_mean - dh * (log_pk + h));
      }
      store_part<scalar_t>(out + k * s.grad_class_stride, gradient, lanes);
    }
  }
}

template <typename scalar_t, int kClasses>
void forward_strip(const StatisticsStrip<scalar_t>& s) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  int64_t x = 0;
  for (; x + kLanes <= s.width; x += kLanes) forward_columns<scalar_t, kClasses>(s, x, kLanes);
  if (x < s.width) forward_columns<scalar_t, 0>(s, x, int(s.width - x));
}

template <typename scalar_t, int kClasses>
void backward_strip(const StatisticsGradientStrip<scalar_t>& s) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  int64_t x = 0;
  for (; x + kLanes <= s.width; x += kLanes) backward_columns<scalar_t, kClasses>(s, x, kLanes);
  if (x < s.width) backward_columns<scalar_t, 0>(s, x, int(s.width - x));
}

template <typename scalar_t>
void forward(const StatisticsStrip<scalar_t>& s) {
  switch (s.classes) {
    case 2: return forward_strip<scalar_t, 2>(s);
    case 3: return forward_strip<scalar_t, 3>(s);
    case 4: return forward_strip<scalar_t, 4>(s);
    default: return forward_strip<scalar_t, 0>(s);
  }
}

template <typename scalar_t>
void backward(const StatisticsGradientStrip<scalar_t>& s) {
  switch (s.classes) {
    case 2: return backward_strip<scalar_t, 2>(s);
    case 3: return backward_strip<scalar_t, 3>(s);
    case 4: return backward_strip<scalar_t, 4>(s);
    default: return backward_strip<scalar_t, 0>(s);
  }
}

}  // namespace

template <typename scalar_t>
StatisticsKernels<scalar_t> statistics_kernels() {
  return {forward<scalar_t>, backward<scalar_t>};
}

template StatisticsKernels<float> statistics_kernels<float>();
template StatisticsKernels<double> statistics_kernels<double>();

}  // namespace pglcl::PGLCL_ISA
