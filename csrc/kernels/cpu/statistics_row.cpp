// Arithmetic of one image row of the patch statistics (METHOD section 2), compiled once per instruction set.
#include "statistics_row.h"

#include "kernel_table.h"
#include "simd.h"

namespace pglcl::PGLCL_ISA {
namespace {

template <typename scalar_t>
constexpr scalar_t kLog2E = scalar_t(1.4426950408889634);


// p log p with 0 log 0 = 0.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> p_log_p(vec_t<scalar_t> p) {
  // A NaN fails the comparison and keeps its own value.
  return p <= scalar_t(0) ? vec_t<scalar_t>{} : p * log(p);
}

// Probabilities of one vector of pixels into p (classes, lanes); returns the pixel entropy.
template <typename scalar_t>
PGLCL_INLINE vec_t<scalar_t> softmax_and_entropy(const scalar_t* input, int64_t class_stride, int64_t classes,
                                                 bool probabilities, scalar_t* p) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  using vec = vec_t<scalar_t>;
  vec entropy{};
  if (probabilities) {
    for (int64_t k = 0; k < classes; ++k) {
      const vec value = load(input + k * class_stride);
      store(p + k * kLanes, value);
      entropy -= p_log_p<scalar_t>(value);
    }
    return entropy;
  }
  vec highest = load(input);
  for (int64_t k = 1; k < classes; ++k) highest = maximum<scalar_t>(highest, load(input + k * class_stride));
  vec sum{}, weighted{};
  for (int64_t k = 0; k < classes; ++k) {
    const vec centred = load(input + k * class_stride) - highest;
    const vec exponent = centred * kLog2E<scalar_t>;
    // A probability below the smallest float is 0, so that its class counts as absent.
    const vec e = exponent < scalar_t(-126) ? vec{} : exp2(exponent);
    sum += e;
    weighted += e * centred;
    store(p + k * kLanes, e);
  }
  const vec inverse = scalar_t(1) / sum;
  for (int64_t k = 0; k < classes; ++k) store(p + k * kLanes, load(p + k * kLanes) * inverse);
  entropy = log(sum) - weighted * inverse;
  // Rounding can leave a certain pixel a little below zero.
  return entropy < scalar_t(0) ? vec{} : entropy;
}

// Calls body(x, input, class_stride, lanes): whole vectors read the row in place, the ragged end reads a padded copy.
template <typename scalar_t, typename Body>
PGLCL_INLINE void for_each_vector(const scalar_t* input, int64_t class_stride, int64_t classes, int64_t width,
                                  scalar_t* edge, Body body) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) body(x, input + x, class_stride, kLanes);
  if (x == width) return;
  for (int64_t k = 0; k < classes; ++k)
    for (int i = 0; i < kLanes; ++i) edge[k * kLanes + i] = input[k * class_stride + (x + i < width ? x + i : x)];
  body(x, edge, int64_t(kLanes), int(width - x));
}

template <typename scalar_t>
PGLCL_INLINE void add_to(scalar_t* out, vec_t<scalar_t> value, int lanes) {
  if (lanes == Simd<scalar_t>::kLanes) {
    store(out, load(out) + value);
  } else {
    for (int i = 0; i < lanes; ++i) out[i] += value[i];
  }
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

template <typename scalar_t>
void forward_row(const StatisticsRow<scalar_t>& row) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  scalar_t* p = row.scratch;
  scalar_t* edge = row.scratch + row.classes * kLanes;
  for_each_vector<scalar_t>(
      row.input, row.class_stride, row.classes, row.width, edge,
      [&](int64_t x, const scalar_t* input, int64_t class_stride, int lanes) __attribute__((always_inline)) {
        const vec_t<scalar_t> h =
            softmax_and_entropy<scalar_t>(input, class_stride, row.classes, row.probabilities, p);
        for (int target = 0; target < row.targets; ++target) {
          add_to<scalar_t>(row.entropy[target] + x, h, lanes);
          for (int64_t k = 0; k < row.classes; ++k) {
            const vec_t<scalar_t> pk = load(p + k * kLanes);
            add_to<scalar_t>(row.mass[target] + k * row.width + x, pk, lanes);
            add_to<scalar_t>(row.product[target] + k * row.width + x, pk * h, lanes);
          }
        }
      });
}

template <typename scalar_t>
void backward_row(const StatisticsGradientRow<scalar_t>& row) {
  using vec = vec_t<scalar_t>;
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  scalar_t* p = row.scratch;
  scalar_t* edge = row.scratch + row.classes * kLanes;
  for_each_vector<scalar_t>(
      row.input, row.class_stride, row.classes, row.width, edge,
      [&](int64_t x, const scalar_t* input, int64_t class_stride, int lanes) __attribute__((always_inline)) {
        const vec h = softmax_and_entropy<scalar_t>(input, class_stride, row.classes, row.probabilities, p);
        // dL/dh(x), and dL/dp_k(x) with h held fixed.
        vec dh = load_part<scalar_t>(row.alpha + x, lanes);
        vec dp_mean{};
        for (int64_t k = 0; k < row.classes; ++k) {
          const vec pk = load(p + k * kLanes);
          const vec gamma = load_part<scalar_t>(row.gamma + k * row.width + x, lanes);
          const vec beta = load_part<scalar_t>(row.beta + k * row.width + x, lanes);
          dh += gamma * pk;
          dp_mean += (beta + gamma * h) * pk;
        }
        vec log_sum{};
        if (!row.probabilities) {
          vec highest = load(input);
          for (int64_t k = 1; k < row.classes; ++k) highest = maximum<scalar_t>(highest, load(input + k * class_stride));
          vec sum{};
          for (int64_t k = 0; k < row.classes; ++k)
            sum += exp2((load(input + k * class_stride) - highest) * kLog2E<scalar_t>);
          log_sum = log(sum) + highest;
        }
        for (int64_t k = 0; k < row.classes; ++k) {
          const vec pk = load(p + k * kLanes);
          const vec gamma = load_part<scalar_t>(row.gamma + k * row.width + x, lanes);
          const vec beta = load_part<scalar_t>(row.beta + k * row.width + x, lanes);
          const vec dp = beta + gamma * h;
          vec gradient;
          if (row.probabilities) {
            // dh/dp = -(log p + 1); its value at p = 0, where it is infinite, is taken as 0.
            const vec slope = pk <= scalar_t(0) ? vec{} : -(log(pk) + scalar_t(1));
            gradient = dp + dh * slope;
          } else {
            // dh/dlogit_k = -p_k (log p_k + h), and the softmax Jacobian for dp.
            const vec log_pk = load(input + k * class_stride) - log_sum;
            gradient = pk * (dp - dp_mean - dh * (log_pk + h));
          }
          store_part<scalar_t>(row.grad_input + k * row.grad_class_stride + x, gradient, lanes);
        }
      });
}

}  // namespace

template <typename scalar_t>
StatisticsKernels<scalar_t> statistics_kernels() {
  return {forward_row<scalar_t>, backward_row<scalar_t>};
}

template StatisticsKernels<float> statistics_kernels<float>();
template StatisticsKernels<double> statistics_kernels<double>();

}  // namespace pglcl::PGLCL_ISA
