// Arithmetic of one strip of image rows of the patch statistics (method, section 2), compiled once per instruction set.
//
// Both passes walk down a strip one vector of columns at a time. Common numbers of classes are template arguments.
#include "statistics_strip.h"

#include "elements.h"
#include "kernel_table.h"

namespace pglcl::PGLCL_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// p log p with 0 log 0 = 0. NaN fails the comparison, and stays NaN.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> p_log_p(vec_t<scalar_t> p) {
  return p <= scalar_t(0) ? vec_t<scalar_t>{} : p * log(p);
}

// Each kind is compiled separately: a number of classes (0: any number, in scratch memory), logits or probabilities.
template <int kNumber, bool kGiven>
struct Classes {
  static constexpr int number = kNumber;
  static constexpr bool given = kGiven;
  static int64_t count(int64_t classes) { return kNumber > 0 ? kNumber : classes; }
};

// Sums of one vector of pixels. For logits: the highest, the sum of the exponentials relative to it, and their sum
// weighted with the exponents. For probabilities: the entropy, as `weighted`.
template <typename scalar_t>
struct Sums {
  vec_t<scalar_t> highest, sum, weighted;
};

// p[k] = exponential of class k, or its probability if that is given.
template <typename scalar_t, typename Kind, typename element_t, typename P>
PGLCL_INLINE Sums<scalar_t> sum_classes(const element_t* input, int64_t class_stride, int64_t classes, P& p) {
  using vec = vec_t<scalar_t>;
  const int64_t count = Kind::count(classes);
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) p[k] = read(input + k * class_stride);
  Sums<scalar_t> result{};
  if constexpr (Kind::given) {
    for (int64_t k = 0; k < count; ++k) result.weighted -= p_log_p<scalar_t>(p[k]);
    return result;
  }
  result.highest = p[0];
#pragma GCC unroll 4
  for (int64_t k = 1; k < count; ++k) result.highest = maximum<scalar_t>(result.highest, p[k]);
  const auto exponent = [&](int64_t k) __attribute__((always_inline)) {
    // In units of log 2, so that 2^x replaces e^x. The distance of two logits may be infinite, and 0 times infinity is
    // NaN.
    return clamp_min(vec(p[k] - result.highest) * scalar_t(kLog2E), kLeastExponent<scalar_t>);
  };
  vec x = exponent(0);
  p[0] = result.sum = exp2_to_zero(x);
  result.weighted = result.sum * x;
#pragma GCC unroll 4
  for (int64_t k = 1; k < count; ++k) {
    x = exponent(k);
    const vec e = exp2_to_zero(x);
    result.sum += e;
    result.weighted += e * x;
    p[k] = e;
  }
  return result;
}

// For one vector of pixels: the factor that makes p[k] a probability, the entropy, and for logits the log of the sum of
// exponentials relative to the highest. The log and the highest logit are not added, since rounding large logits would
// lose the digits of the log.
template <typename scalar_t>
struct Prediction {
  vec_t<scalar_t> inverse, entropy, log_sum;
};

template <typename scalar_t, typename Kind>
PGLCL_INLINE Prediction<scalar_t> predict(const Sums<scalar_t>& sums) {
  if constexpr (Kind::given) return {broadcast(scalar_t(1)), sums.weighted, vec_t<scalar_t>{}};
  const vec_t<scalar_t> inverse = scalar_t(1) / sums.sum, log_sum = log_from_one(sums.sum);
  // Rounding can bring the entropy of a certain pixel a little below zero.
  return {inverse, clamp_min(log_sum - sums.weighted * inverse * scalar_t(kLn2), scalar_t(0)), log_sum};
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

// A gradient in the type of the input.
template <typename scalar_t, typename element_t>
PGLCL_INLINE void write_part(element_t* out, vec_t<scalar_t> value, int lanes) {
  if (lanes == Simd<scalar_t>::kLanes) return write(out, value);
  element_t whole[Simd<scalar_t>::kLanes];
  write(whole, value);
  for (int i = 0; i < lanes; ++i) out[i] = whole[i];
}

// Copies the last columns of a row, fewer than a vector, to `edge` (classes, lanes). The last column is repeated.
template <typename scalar_t, typename element_t>
void copy_edge(const element_t* input, int64_t class_stride, int64_t classes, int lanes, scalar_t* edge) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  element_t whole[kLanes];
  for (int64_t k = 0; k < classes; ++k) {
    for (int i = 0; i < kLanes; ++i) whole[i] = input[k * class_stride + (i < lanes ? i : lanes - 1)];
    store(edge + k * kLanes, read(whole));
  }
}

// Rows that are computed at the same time: first all exponentials, then the numbers that follow from their sums. Each
// step is a long chain of dependent instructions, and a processor looks only so far ahead for independent ones.
constexpr int kRowsAtOnce = kStatisticsRows;

// The hardware prefetches along rows, but a strip is walked down. So this asks for the next columns of the row, which
// are needed after one strip's height.
template <typename element_t>
PGLCL_INLINE void prefetch_next_columns(const element_t* input, int64_t class_stride, int64_t classes) {
  constexpr int64_t kAhead = 128 / sizeof(element_t);
  for (int64_t k = 0; k < classes; ++k) __builtin_prefetch(input + k * class_stride + kAhead);
}

// p of all classes in each of the rows that are computed at once; for any number of classes it is in scratch memory.
template <typename scalar_t, int kClasses>
struct Probabilities {
  vec_t<scalar_t> p[kRowsAtOnce][kClasses];
  explicit Probabilities(scalar_t*, int64_t) {}
  PGLCL_INLINE vec_t<scalar_t>* row(int r) { return p[r]; }
};
template <typename scalar_t>
struct Probabilities<scalar_t, 0> {
  using vec = typename Simd<scalar_t>::vec_unaligned;
  vec* p;
  int64_t classes;
  Probabilities(scalar_t* scratch, int64_t count) : p(reinterpret_cast<vec*>(scratch)), classes(count) {}
  PGLCL_INLINE vec* row(int r) { return p + r * classes; }
};

// Calls `body` with one row's elements in a vector of columns: in place, or with a copy at the ragged end.
template <typename element_t, template <typename> class Strip, typename scalar_t, typename Body>
PGLCL_INLINE void with_columns(const Strip<scalar_t>& s, int64_t row, int64_t x, int lanes, Body body) {
  const element_t* input = static_cast<const element_t*>(s.input) + row * s.row_stride + x;
  if (lanes == Simd<scalar_t>::kLanes) return body(input, s.class_stride);
  scalar_t* edge = s.scratch + kRowsAtOnce * s.classes * kMaxLanes;
  copy_edge<scalar_t>(input, s.class_stride, s.classes, lanes, edge);
  body(const_cast<const scalar_t*>(edge), int64_t(Simd<scalar_t>::kLanes));
}

// The first step of both passes, of rows `first` to `last`.
template <typename Kind, typename element_t, template <typename> class Strip, typename scalar_t>
PGLCL_INLINE void sum_rows(const Strip<scalar_t>& s, int64_t first, int64_t last, int64_t x, int lanes,
                           Probabilities<scalar_t, Kind::number>& p, Sums<scalar_t>* sums) {
#pragma GCC unroll 1
  for (int64_t r = first; r < last; ++r) {
    prefetch_next_columns(static_cast<const element_t*>(s.input) + r * s.row_stride + x, s.class_stride,
                          Kind::count(s.classes));
    auto* own = p.row(int(r - first));
    with_columns<element_t>(s, r, x, lanes,
                            [&](const auto* input, int64_t class_stride) __attribute__((always_inline)) {
                              sums[r - first] = sum_classes<scalar_t, Kind>(input, class_stride, s.classes, own);
                            });
  }
}

template <typename scalar_t, typename element_t, typename Kind>
PGLCL_INLINE void forward_columns(const StatisticsStrip<scalar_t>& s, int64_t first, int64_t last, int64_t x,
                                  int lanes) {
  using vec = vec_t<scalar_t>;
  constexpr int kClasses = Kind::number;
  Probabilities<scalar_t, kClasses> probabilities(s.scratch, s.classes);
  Sums<scalar_t> sums[kRowsAtOnce];
  sum_rows<Kind, element_t>(s, first, last, x, lanes, probabilities, sums);
  const int rows = int(last - first);
  vec inverse[kRowsAtOnce], weight[kRowsAtOnce];
  vec entropy = load_part<scalar_t>(s.entropy + x, lanes);
#pragma GCC unroll 1
  for (int r = 0; r < rows; ++r) {
    const auto prediction = predict<scalar_t, Kind>(sums[r]);
    entropy += prediction.entropy;
    inverse[r] = prediction.inverse;
    weight[r] = prediction.inverse * prediction.entropy;
  }
  store_part<scalar_t>(s.entropy + x, entropy, lanes);
  const int64_t classes = Kind::count(s.classes);
#pragma GCC unroll 4
  for (int64_t k = 0; k < classes; ++k) {
    scalar_t *const mass_row = s.mass + k * s.width + x, *const product_row = s.product + k * s.width + x;
    vec mass = load_part<scalar_t>(mass_row, lanes), product = load_part<scalar_t>(product_row, lanes);
#pragma GCC unroll 1
    for (int r = 0; r < rows; ++r) {
      const vec p = probabilities.row(r)[k];
      mass += p * inverse[r];
      product += p * weight[r];
    }
    store_part<scalar_t>(mass_row, mass, lanes);
    store_part<scalar_t>(product_row, product, lanes);
  }
}

template <typename scalar_t, typename element_t, typename Kind>
PGLCL_INLINE void backward_columns(const StatisticsGradientStrip<scalar_t>& s, int64_t first, int64_t last, int64_t x,
                                   int lanes) {
  using vec = vec_t<scalar_t>;
  Probabilities<scalar_t, Kind::number> probabilities(s.scratch, s.classes);
  Sums<scalar_t> sums[kRowsAtOnce];
  sum_rows<Kind, element_t>(s, first, last, x, lanes, probabilities, sums);
  const int64_t classes = Kind::count(s.classes);
  const vec alpha = load_part<scalar_t>(s.alpha + x, lanes);
#pragma GCC unroll 1
  for (int64_t r = first; r < last; ++r) {
    auto* p = probabilities.row(int(r - first));
    const vec highest = sums[r - first].highest;
    const auto prediction = predict<scalar_t, Kind>(sums[r - first]);
    const vec inverse = prediction.inverse, h = prediction.entropy;
    // dL/dh(x), and the mean over classes of dL/dp_k(x) with h held fixed.
    vec dh = alpha, dp_mean{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < classes; ++k) {
      const vec gamma = load_part<scalar_t>(s.gamma + k * s.width + x, lanes);
      const vec beta = load_part<scalar_t>(s.beta + k * s.width + x, lanes);
      const vec pk = p[k] * inverse;
      dh += gamma * pk;
      dp_mean += (beta + gamma * h) * pk;
    }
    const vec offset = h - prediction.log_sum;
    element_t* out = static_cast<element_t*>(s.grad_input) + r * s.row_stride + x;
    with_columns<element_t>(s, r, x, lanes,
                            [&](const auto* input, int64_t class_stride) __attribute__((always_inline)) {
#pragma GCC unroll 4
                              for (int64_t k = 0; k < classes; ++k) {
                                const vec gamma = load_part<scalar_t>(s.gamma + k * s.width + x, lanes);
                                const vec beta = load_part<scalar_t>(s.beta + k * s.width + x, lanes);
                                const vec dp = beta + gamma * h;
                                const vec pk = p[k] * inverse;
                                vec gradient;
                                if constexpr (Kind::given) {
                                  // dh/dp = -(log p + 1); its value at p = 0, where it is infinite, is taken as 0.
                                  const vec slope = pk <= scalar_t(0) ? vec{} : -(log(pk) + scalar_t(1));
                                  gradient = dp + dh * slope;
                                } else {
                                  // dh/dlogit_k = -p_k (log p_k + h), and the softmax Jacobian for dp.
                                  const vec centred = read(input + k * class_stride) - highest;
                                  const vec log_pk_and_h = clamp_min(centred, kLeastExponent<scalar_t>) + offset;
                                  gradient = pk * (dp - dp_mean - dh * log_pk_and_h);
                                }
                                write_part<scalar_t>(out + k * s.class_stride, gradient, lanes);
                              }
                            });
  }
}

// The ragged end of a row, compiled once for all numbers of classes.
template <typename scalar_t, typename element_t, bool kGiven>
__attribute__((noinline)) void ragged_columns(const StatisticsStrip<scalar_t>& s, int64_t first, int64_t last,
                                              int64_t x, int lanes) {
  forward_columns<scalar_t, element_t, Classes<0, kGiven>>(s, first, last, x, lanes);
}
template <typename scalar_t, typename element_t, bool kGiven>
__attribute__((noinline)) void ragged_columns(const StatisticsGradientStrip<scalar_t>& s, int64_t first, int64_t last,
                                              int64_t x, int lanes) {
  backward_columns<scalar_t, element_t, Classes<0, kGiven>>(s, first, last, x, lanes);
}

// Calls a function for each vector of columns and, within it, for a few rows of the strip at once.
template <typename element_t, typename Kind, template <typename> class Strip, typename scalar_t, typename Whole>
PGLCL_INLINE void walk(const Strip<scalar_t>& s, Whole whole) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  for (int64_t x = 0; x < s.width; x += kLanes)
    for (int64_t first = 0; first < s.rows; first += kRowsAtOnce) {
      const int64_t last = first + kRowsAtOnce < s.rows ? first + kRowsAtOnce : s.rows;
      if (x + kLanes <= s.width)
        whole(first, last, x);
      else
        ragged_columns<scalar_t, element_t, Kind::given>(s, first, last, x, int(s.width - x));
    }
}

template <typename scalar_t, typename element_t, typename Kind>
void forward_strip(const StatisticsStrip<scalar_t>& s) {
  walk<element_t, Kind>(s, [&](int64_t first, int64_t last, int64_t x) __attribute__((always_inline)) {
    forward_columns<scalar_t, element_t, Kind>(s, first, last, x, Simd<scalar_t>::kLanes);
  });
}

template <typename scalar_t, typename element_t, typename Kind>
void backward_strip(const StatisticsGradientStrip<scalar_t>& s) {
  walk<element_t, Kind>(s, [&](int64_t first, int64_t last, int64_t x) __attribute__((always_inline)) {
    backward_columns<scalar_t, element_t, Kind>(s, first, last, x, Simd<scalar_t>::kLanes);
  });
}

// Calls run(element, kind) with the types of a strip's elements and of its classes.
template <typename scalar_t, typename Strip, typename Run>
PGLCL_INLINE void by_types(const Strip& s, Run run) {
  const auto by_classes = [&](auto element) {
    if (s.probabilities) return run(element, Classes<0, true>{});
    switch (s.classes) {
      case 2: return run(element, Classes<2, false>{});
      case 3: return run(element, Classes<3, false>{});
      case 4: return run(element, Classes<4, false>{});
      default: return run(element, Classes<0, false>{});
    }
  };
  if constexpr (sizeof(scalar_t) == 4) {
    if (s.element == Element::kBFloat16) return by_classes(BFloat16{});
    if (s.element == Element::kFloat16) return by_classes(Float16{});
  }
  by_classes(scalar_t{});
}

template <typename scalar_t>
void forward(const StatisticsStrip<scalar_t>& s) {
  by_types<scalar_t>(s,
                     [&](auto element, auto kind) { forward_strip<scalar_t, decltype(element), decltype(kind)>(s); });
}

template <typename scalar_t>
void backward(const StatisticsGradientStrip<scalar_t>& s) {
  by_types<scalar_t>(s,
                     [&](auto element, auto kind) { backward_strip<scalar_t, decltype(element), decltype(kind)>(s); });
}

}  // namespace

template <typename scalar_t>
StatisticsKernels<scalar_t> statistics_kernels() {
  return {forward<scalar_t>, backward<scalar_t>};
}

template StatisticsKernels<float> statistics_kernels<float>();
template StatisticsKernels<double> statistics_kernels<double>();

}  // namespace pglcl::PGLCL_ISA
