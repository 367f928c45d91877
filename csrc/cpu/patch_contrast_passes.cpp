// Both passes of the fused contrastive loss over the tiles of a plan (method, section 5): they prepare the numbers of
// the tiles, and compute the results from the tiles' sums.
#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "patch_contrast.h"
#include "patch_contrast_plan.h"
#include "patch_contrast_wide.h"

namespace pglcl {

template <typename scalar_t>
void patch_contrast_forward(const ContrastInputs<scalar_t>& inputs, const AnchorSums<scalar_t>& out,
                            const Parallel& parallel) {
  const Arena::Call call;
  const scalar_t infinity = std::numeric_limits<scalar_t>::infinity(), nan = std::numeric_limits<scalar_t>::quiet_NaN();
  const int64_t n = inputs.anchors.rows;
  std::fill_n(out.loss, n, scalar_t(0));
  std::fill_n(out.max_logit, n, -infinity);
  std::fill_n(out.log_sum, n, -infinity);
  std::fill_n(out.positive_logit, n, scalar_t(0));
  std::fill_n(out.num_positives, n, 0);

  ContrastPlan<scalar_t> plan(inputs, false, parallel);
  if constexpr (sizeof(scalar_t) == 4)
    if (plan.needs_float64()) return forward_in_float64(inputs, out, parallel);
  const int64_t padded = plan.padded();
  ContrastTile<scalar_t>& tile = plan.tile();
  Buffer<scalar_t> max_logit(padded, -infinity);
  Buffer<double> sums(4 * padded, 0);
  tile.state.max_logit = max_logit.data();
  tile.state.positive_exp = sums.data();
  tile.state.negative_exp = sums.data() + padded;
  tile.state.positive_logit = sums.data() + 2 * padded;
  tile.state.positive_count = sums.data() + 3 * padded;

  if (!tile.fixed_shift) {
    plan.run(plan.kernels().maximum);
    for (int64_t i = 0; i < padded; ++i)
      if (max_logit[i] == -infinity) max_logit[i] = 0;  // no pair, or none with a weight
  }
  plan.run(plan.kernels().sum);

  // A negative of small weight may exceed the logarithm of the denominator by this much.
  const double lower_weight = inputs.negative_weight > 0 ? std::min(std::log(inputs.negative_weight), 0.0) : 0.0;
  for (int64_t i = 0; i < plan.count(); ++i) {
    const int64_t row = plan.index(i);
    const double total = tile.state.positive_exp[i] + plan.weight_of_sums() * tile.state.negative_exp[i];
    const int32_t count = int32_t(tile.state.positive_count[i]);
    const double positive_sum = tile.state.positive_logit[i];
    out.num_positives[row] = count;
    if (plan.undecided(i)) {
      out.loss[row] = out.max_logit[row] = out.log_sum[row] = nan;
      out.num_positives[row] = std::max(count, 1);
    } else if (tile.fixed_shift) {
      const double lse = (double(tile.shift) + std::log2(total)) * kLn2;
      const double positive = count > 0 ? positive_sum / (inputs.temperature * count) : 0;
      if (total == 0) continue;
      out.max_logit[row] = scalar_t(lse - lower_weight);
      out.log_sum[row] = scalar_t(lse - double(out.max_logit[row]));
      out.positive_logit[row] = scalar_t(positive);
      if (count > 0) out.loss[row] = scalar_t(lse - positive);
    } else {
      // The maximum is already subtracted from the logits of the positives, so large logits keep their digits.
      const double below_maximum = count > 0 ? positive_sum / (kLogitUnit * count) : 0;
      if (total == 0) continue;
      out.max_logit[row] = max_logit[i];
      out.log_sum[row] = scalar_t(std::log(total));
      if (count == 0) continue;
      out.positive_logit[row] = scalar_t(double(max_logit[i]) + below_maximum);
      out.loss[row] = scalar_t(std::log(total) - below_maximum);
    }
  }
}

namespace {

// With a fixed shift, no product of such a coefficient and an exponential comes near the largest float.
constexpr double kLargestCoefficient = 1e30;

// A power of two that keeps coefficients within the range of scalar_t for any upstream gradient. It is 1 for the
// gradients of ordinary training.
template <typename scalar_t>
double scale_of_coefficients(const scalar_t* grad_rows, int64_t n, double temperature) {
  constexpr int kLarge = 40, kModerate = 20;  // a negative weight of 1e20 goes with it
  double largest = 0;
  for (int64_t i = 0; i < n; ++i)
    if (std::isfinite(grad_rows[i])) largest = std::max(largest, std::abs(double(grad_rows[i])));
  const int exponent = largest > 0 ? std::ilogb(largest) - std::ilogb(temperature) : 0;
  return exponent > kLarge ? std::ldexp(1.0, kModerate - exponent) : 1.0;
}

// The coefficients of each anchor: dL/ds_ip = g (p_ip - 1 / |P|) and dL/ds_in = g p_in; g contains 1 / temperature.
template <typename scalar_t>
struct Coefficients {
  Buffer<scalar_t> max_logit, positive, negative, mean;
  double largest = 0;

  Coefficients(ContrastPlan<scalar_t>& plan, const ContrastInputs<scalar_t>& inputs, const ContrastTile<scalar_t>& tile,
               const scalar_t* grad_rows, double scale, const scalar_t* saved_max_logit, const scalar_t* log_sum,
               const int32_t* num_positives)
      : max_logit(plan.padded(), std::numeric_limits<scalar_t>::infinity()),
        positive(plan.padded(), 0),
        negative(plan.padded(), 0),
        mean(plan.padded(), 0) {
    for (int64_t i = 0; i < plan.count(); ++i) {
      const int64_t row = plan.index(i);
      const double g = double(grad_rows[row]) * scale / inputs.temperature;
      if (num_positives[row] == 0 || g == 0) {
        plan.leave_out(i);
        continue;
      }
      // The factors that turn the kernel's exponentials into shares.
      const double base = tile.fixed_shift ? double(tile.shift) * kLn2 - double(saved_max_logit[row]) : 0;
      const double share = g * std::exp(base - double(log_sum[row]));
      const double weighted_share = share * plan.weight_of_sums();
      max_logit[i] = saved_max_logit[row];
      positive[i] = scalar_t(share);
      negative[i] = scalar_t(weighted_share);
      mean[i] = scalar_t(g / num_positives[row]);
      largest = std::max({largest, std::abs(share), std::abs(weighted_share)});
    }
  }
};

}  // namespace

template <typename scalar_t>
void patch_contrast_backward(const ContrastInputs<scalar_t>& inputs, const scalar_t* grad_rows,
                             const scalar_t* max_logit, const scalar_t* log_sum, const int32_t* num_positives,
                             void* grad_anchors, void* grad_keys, const Parallel& parallel) {
  const Arena::Call call;
  ContrastPlan<scalar_t> plan(inputs, true, parallel);
  if constexpr (sizeof(scalar_t) == 4)
    if (plan.needs_float64())
      return backward_in_float64(inputs, grad_rows, {max_logit, log_sum, num_positives}, grad_anchors, grad_keys,
                                 parallel);
  ContrastTile<scalar_t>& tile = plan.tile();
  const double scale = scale_of_coefficients(grad_rows, inputs.anchors.rows, inputs.temperature);
  const auto coefficients_of = [&] {
    return Coefficients<scalar_t>(plan, inputs, tile, grad_rows, scale, max_logit, log_sum, num_positives);
  };
  Coefficients<scalar_t> coefficients = coefficients_of();
  if (tile.fixed_shift && coefficients.largest > kLargestCoefficient) {
    // A large upstream gradient belongs to an anchor whose logits all lie far below the bound. Its own maximum is used.
    plan.measure_exponents(false);
    coefficients = coefficients_of();
  }
  tile.state.max_logit = coefficients.max_logit.data();
  tile.state.positive_coefficient = coefficients.positive.data();
  tile.state.negative_coefficient = coefficients.negative.data();
  tile.state.mean_coefficient = coefficients.mean.data();

  // Gradients of the accumulating type are summed in the output, others in a sorted copy.
  const bool direct = inputs.anchors.dtype == (sizeof(scalar_t) == 8 ? ScalarType::Double : ScalarType::Float);
  Buffer<scalar_t> anchor_sums, key_sums;
  tile.grad_stride = inputs.depth;
  tile.grad_indexed = direct;
  if (direct) {
    tile.grad_anchors = static_cast<scalar_t*>(grad_anchors);
    tile.grad_keys = static_cast<scalar_t*>(inputs.symmetric() ? grad_anchors : grad_keys);
  } else {
    if (grad_anchors) anchor_sums = Buffer<scalar_t>(plan.padded() * inputs.depth, 0);
    if (grad_keys) key_sums = Buffer<scalar_t>(tile.keys.padded * inputs.depth, 0);
    tile.grad_anchors = anchor_sums.data();
    tile.grad_keys = inputs.symmetric() ? anchor_sums.data() : key_sums.data();
  }
  plan.run(plan.kernels().gradient);

  if (scale != 1) {
    const auto restore = [&](scalar_t* sums, int64_t rows) {
      for (int64_t i = 0; sums && i < rows * inputs.depth; ++i) sums[i] = scalar_t(double(sums[i]) / scale);
    };
    restore(tile.grad_anchors, direct ? inputs.anchors.rows : plan.padded());
    if (!inputs.symmetric()) restore(tile.grad_keys, direct ? inputs.keys.rows : tile.keys.padded);
  }

  const auto write_back = [&](const Buffer<scalar_t>& sums, const ContrastSide<scalar_t>& side, void* out) {
    parallel.run(plan.workers(), [&](int worker) {
      const Share share(side.count, plan.workers(), worker);
      for (int64_t i = share.first; i < share.last; ++i)
        write_elements(sums.data() + i * inputs.depth, inputs.depth, out, inputs.anchors.dtype,
                       int64_t(side.index[i]) * inputs.depth);
    });
  };
  if (!direct && grad_anchors) write_back(anchor_sums, tile.anchors, grad_anchors);
  if (!direct && grad_keys) write_back(key_sums, tile.keys, grad_keys);

  if (!grad_anchors) return;
  Buffer<scalar_t> unknown(inputs.depth, std::numeric_limits<scalar_t>::quiet_NaN());
  for (int64_t i = 0; i < plan.count(); ++i) {
    const int64_t out = plan.index(i);
    if (num_positives[out] > 0 && std::isnan(log_sum[out]) && grad_rows[out] != 0)
      write_elements(unknown.data(), inputs.depth, grad_anchors, inputs.anchors.dtype, out * inputs.depth);
  }
}

template void patch_contrast_forward<float>(const ContrastInputs<float>&, const AnchorSums<float>&, const Parallel&);
template void patch_contrast_forward<double>(const ContrastInputs<double>&, const AnchorSums<double>&, const Parallel&);
template void patch_contrast_backward<float>(const ContrastInputs<float>&, const float*, const float*, const float*,
                                             const int32_t*, void*, void*, const Parallel&);
template void patch_contrast_backward<double>(const ContrastInputs<double>&, const double*, const double*,
                                              const double*, const int32_t*, void*, void*, const Parallel&);

}  // namespace pglcl
