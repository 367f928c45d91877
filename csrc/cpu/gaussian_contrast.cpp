// CPU implementation of the op gaussian_contrast: check, allocate, call the kernel, reduce. Its backward op is a
// product by then, the same on every device.
#include "gaussian_contrast_kernel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "../checks.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

template <typename scalar_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_typed(const GaussianContrastArgs& x) {
  check_gaussian_contrast(x);
  const at::ScalarType type = x.accumulate_type();
  const at::Tensor anchors = x.anchors.contiguous(), labels = x.labels.contiguous(), counts = x.counts.contiguous();
  const at::Tensor means = x.means.to(type).contiguous(), covariances = x.covariances.to(type).contiguous();
  const int64_t n = anchors.size(0), depth = anchors.size(1);
  const GaussianInputs<scalar_t> inputs{anchors.const_data_ptr(),
                                        dtype_of(anchors),
                                        n,
                                        depth,
                                        counts.size(0),
                                        labels.const_data_ptr<int64_t>(),
                                        means.const_data_ptr<scalar_t>(),
                                        covariances.const_data_ptr<scalar_t>(),
                                        counts.const_data_ptr<int64_t>(),
                                        means.dim() == 3,
                                        x.temperature,
                                        x.covariance_scale,
                                        x.negative_weight,
                                        x.ignore_index};
  const int64_t bad = find_bad_label(inputs);
  TORCH_CHECK_VALUE(bad < 0, "labels must lie in [0, K) = [0, ", inputs.classes,
                    ") or be ignore_index = ", x.ignore_index, ", got ", inputs.labels[bad], " at ", bad);
  const at::TensorOptions options = anchors.options().dtype(type);
  at::Tensor losses = at::empty({n}, options);
  at::Tensor gradients = at::empty({x.needs_gradients ? n : 0, depth}, options);
  scalar_t* loss_data = losses.mutable_data_ptr<scalar_t>();
  const int64_t valid = gaussian_contrast(
      inputs, loss_data, x.needs_gradients ? gradients.mutable_data_ptr<scalar_t>() : nullptr, torch_threads());
  const at::Tensor num_valid = at::scalar_tensor(valid, options.dtype(at::kLong));
  if (x.reduction == kNone) return {losses, gradients, num_valid};
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += double(loss_data[i]);
  if (x.reduction == kMean) total /= double(std::max<int64_t>(valid, 1));
  return {at::scalar_tensor(total, options), gradients, num_valid};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(PGLCL_GAUSSIAN_PARAMETERS) {
  const GaussianContrastArgs x PGLCL_GAUSSIAN_ARGUMENTS;
  return x.accumulate_type() == at::kDouble ? forward_typed<double>(x) : forward_typed<float>(x);
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& anchors, const at::Tensor& gradients,
                    const at::Tensor& num_valid, int64_t reduction) {
  at::Tensor scale = grad.to(gradients.scalar_type());
  if (reduction == kMean) scale = scale / num_valid.clamp_min(1);
  return (gradients * (reduction == kNone ? scale.unsqueeze(1) : scale)).to(anchors.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) { m.impl("gaussian_contrast", forward); }
TORCH_LIBRARY_IMPL(pglcl_ext, CompositeExplicitAutograd, m) { m.impl("gaussian_contrast_backward", backward); }

}  // namespace pglcl
