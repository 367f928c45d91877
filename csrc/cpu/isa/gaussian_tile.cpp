// Arithmetic of one tile of the Gaussian contrastive loss (method, section 6), compiled once per instruction set.
//
// The quadratic form t' S t of a tile of anchors is one matrix product T S and a dot product per row. The same T S is
// half of its gradient, so the gradient is summed at the same time, and rescaled whenever a larger exponent comes. So
// one pass over the classes is enough, and memory does not grow with their number.
#include "gaussian_tile.h"

#include "kernel_table.h"
#include "tile_gemm.h"

namespace pglcl::PGLCL_ISA {
namespace {

template <typename scalar_t>
scalar_t dot(const scalar_t* a, const scalar_t* b, int64_t stride) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  vec_t<scalar_t> even{}, odd{};
  for (int64_t d = 0; d < stride; d += 2 * kLanes) {
    even += load(a + d) * load(b + d);
    odd += load(a + d + kLanes) * load(b + d + kLanes);
  }
  return horizontal_sum<scalar_t>(even + odd);
}

// g = keep * g + weight * (mean / temperature + spread * product)
template <typename scalar_t>
void add_gradient(const GaussianTile<scalar_t>& t, scalar_t* g, scalar_t keep, scalar_t weight, const scalar_t* mean,
                  const scalar_t* product) {
  const scalar_t of_mean = weight * t.inverse_temperature, of_product = weight * t.spread;
  for (int64_t d = 0; d < t.stride; d += Simd<scalar_t>::kLanes)
    store(g + d, keep * load(g + d) + of_mean * load(mean + d) + of_product * load(product + d));
}

// Sums of exponentials relative to the largest exponent so far.
template <typename scalar_t>
struct Running {
  scalar_t shift, sum, own_logit;
};

template <typename scalar_t>
void add_class(const GaussianTile<scalar_t>& t, int64_t j, Running<scalar_t>* running) {
  const scalar_t* mean = t.means + j * t.stride;
  const bool own = j == t.own_class;
  tile_gemm<scalar_t, false>(t.rows, t.stride, t.depth, t.anchors, t.stride, 1, t.covariances + j * t.depth * t.stride,
                             t.stride, {t.products, t.stride, nullptr});
  for (int64_t r = 0; r < t.rows; ++r) {
    const scalar_t* anchor = t.anchors + r * t.stride;
    const scalar_t* product = t.products + r * t.stride;
    const scalar_t logit = dot(anchor, mean, t.stride) * t.inverse_temperature;
    scalar_t exponent = logit + scalar_t(0.5) * t.spread * dot(anchor, product, t.stride);
    Running<scalar_t>& at = running[r];
    scalar_t keep = 0, weight = 1;
    if (own) {  // the first class to be added
      at = {exponent, 1, logit};
    } else {
      exponent += t.log_weight;
      if (exponent > at.shift) {
        keep = scalar_t(__builtin_exp(double(at.shift - exponent)));
        at.shift = exponent;
      } else {
        keep = 1;
        weight = scalar_t(__builtin_exp(double(exponent - at.shift)));
      }
      at.sum = at.sum * keep + weight;
    }
    if (t.gradients) add_gradient(t, t.gradients + r * t.stride, keep, weight, mean, product);
  }
}

template <typename scalar_t>
void gaussian_tile(const GaussianTile<scalar_t>& t) {
  Running<scalar_t> running[kGaussianRows];
  if (t.gradients)
    for (int64_t i = 0; i < t.rows * t.stride; ++i) t.gradients[i] = 0;
  add_class(t, t.own_class, running);
  const bool negatives = t.log_weight > -__builtin_inf();
  for (int64_t j = 0; negatives && j < t.classes; ++j)
    if (j != t.own_class && t.taking_part[j]) add_class(t, j, running);
  const scalar_t* own_mean = t.means + t.own_class * t.stride;
  for (int64_t r = 0; r < t.rows; ++r) {
    const Running<scalar_t>& at = running[r];
    t.losses[r] = at.shift + scalar_t(__builtin_log(double(at.sum))) - at.own_logit;
    if (!t.gradients) continue;
    scalar_t* g = t.gradients + r * t.stride;
    const scalar_t share = 1 / at.sum;
    for (int64_t d = 0; d < t.stride; d += Simd<scalar_t>::kLanes)
      store(g + d, share * load(g + d) - t.inverse_temperature * load(own_mean + d));
  }
}

}  // namespace

template <typename scalar_t>
GaussianKernels<scalar_t> gaussian_kernels() {
  return {Simd<scalar_t>::kPanel, gaussian_tile<scalar_t>};
}

template GaussianKernels<float> gaussian_kernels<float>();
template GaussianKernels<double> gaussian_kernels<double>();

}  // namespace pglcl::PGLCL_ISA
