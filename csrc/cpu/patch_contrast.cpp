// CPU implementation of the op patch_contrast: check, allocate, call the kernel, reduce.
#include "patch_contrast_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

at::Tensor converted(const std::optional<at::Tensor>& t, at::ScalarType type) {
  return t ? t->to(type).contiguous() : at::Tensor();
}

template <typename scalar_t>
const scalar_t* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr;
}

// loss, max_logit, log_sum, positive_logit, num_positives, num_valid
using ContrastOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The inputs as the kernel reads them, and the tensors that keep them alive.
template <typename scalar_t>
struct Arguments {
  at::Tensor anchors, keys, labels, key_labels, descriptors, key_descriptors, positive_bounds, negative_bounds;
  ContrastInputs<scalar_t> inputs;

  explicit Arguments(const PatchContrastArgs& x) {
    check_patch_contrast(x);
    const at::ScalarType type = x.accumulate_type();
    anchors = x.anchors.contiguous();
    keys = converted(x.keys, anchors.scalar_type());
    labels = x.labels.contiguous();
    key_labels = converted(x.key_labels, at::kLong);
    descriptors = converted(x.descriptors, type);
    key_descriptors = converted(x.key_descriptors, type);
    positive_bounds = converted(x.positive_bounds, type);
    negative_bounds = converted(x.negative_bounds, type);
    inputs = ContrastInputs<scalar_t>{};
    inputs.anchors = {anchors.const_data_ptr(), dtype_of(anchors), anchors.size(0)};
    if (keys.defined()) {
      // An empty tensor has no address, and a null one means that the anchors are the keys.
      const void* data = keys.numel() ? keys.const_data_ptr() : static_cast<const void*>(&inputs);
      inputs.keys = {data, dtype_of(keys), keys.size(0)};
    }
    inputs.depth = anchors.size(1);
    inputs.labels = labels.const_data_ptr<int64_t>();
    inputs.key_labels = data_or_null<int64_t>(key_labels);
    inputs.descriptors = data_or_null<scalar_t>(descriptors);
    inputs.key_descriptors = data_or_null<scalar_t>(key_descriptors);
    inputs.channels = descriptors.defined() && descriptors.dim() == 2 ? descriptors.size(1) : 1;
    inputs.positive_bound = scalar_t(x.positive_bound);
    inputs.negative_bound = scalar_t(x.negative_bound);
    inputs.positive_bounds = data_or_null<scalar_t>(positive_bounds);
    inputs.negative_bounds = data_or_null<scalar_t>(negative_bounds);
    if (x.positive_mask) {
      const auto& positive = *x.positive_mask;
      const auto& negative = *x.negative_mask;
      inputs.masks = {positive.numel() ? positive.const_data_ptr<bool>() : reinterpret_cast<const bool*>(&inputs),
                      negative.numel() ? negative.const_data_ptr<bool>() : reinterpret_cast<const bool*>(&inputs),
                      {positive.stride(0), positive.stride(1)},
                      {negative.stride(0), negative.stride(1)}};
    }
    inputs.temperature = x.temperature;
    inputs.negative_weight = x.negative_weight;
    inputs.ignore_index = x.ignore_index;
    inputs.self_offset = x.self_offset;
  }
};

template <typename scalar_t>
ContrastOutputs forward_typed(const PatchContrastArgs& x) {
  const Arguments<scalar_t> arguments(x);
  const int64_t n = x.anchors.size(0);
  const at::TensorOptions options = x.anchors.options().dtype(x.accumulate_type());
  at::Tensor losses = at::empty({n}, options), max_logit = at::empty({n}, options), log_sum = at::empty({n}, options);
  at::Tensor positive_logit = at::empty({n}, options);
  at::Tensor num_positives = at::empty({n}, options.dtype(at::kInt));
  const AnchorSums<scalar_t> sums{losses.mutable_data_ptr<scalar_t>(), max_logit.mutable_data_ptr<scalar_t>(),
                                  log_sum.mutable_data_ptr<scalar_t>(), positive_logit.mutable_data_ptr<scalar_t>(),
                                  num_positives.mutable_data_ptr<int32_t>()};
  patch_contrast_forward(arguments.inputs, sums, torch_threads());

  int64_t valid = 0;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += double(sums.loss[i]);
    valid += sums.num_positives[i] > 0;
  }
  if (x.reduction == kMean) total /= double(std::max<int64_t>(valid, 1));
  at::Tensor loss = x.reduction == kNone ? losses : at::scalar_tensor(total, options);
  return {loss, max_logit, log_sum, positive_logit, num_positives, at::scalar_tensor(valid, options.dtype(at::kLong))};
}

ContrastOutputs forward(PGLCL_CONTRAST_PARAMETERS) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  return x.accumulate_type() == at::kDouble ? forward_typed<double>(x) : forward_typed<float>(x);
}

template <typename scalar_t>
std::tuple<at::Tensor, at::Tensor> backward_typed(const at::Tensor& grad, const at::Tensor& max_logit,
                                                  const at::Tensor& log_sum, const at::Tensor& num_positives,
                                                  const at::Tensor& num_valid, const PatchContrastArgs& x,
                                                  bool needs_anchors, bool needs_keys) {
  const Arguments<scalar_t> arguments(x);
  const int64_t n = x.anchors.size(0);
  const at::Tensor wide_grad = grad.to(x.accumulate_type()).contiguous();
  at::Tensor grad_rows = at::empty({n}, wide_grad.options());
  scalar_t* rows = grad_rows.mutable_data_ptr<scalar_t>();
  const scalar_t* from = wide_grad.const_data_ptr<scalar_t>();
  const double share = x.reduction == kMean ? double(std::max<int64_t>(num_valid.item<int64_t>(), 1)) : 1.0;
  for (int64_t i = 0; i < n; ++i) rows[i] = scalar_t(double(from[x.reduction == kNone ? i : 0]) / share);

  needs_keys = needs_keys && x.keys.has_value();
  at::Tensor grad_anchors =
      needs_anchors ? at::zeros(x.anchors.sizes(), x.anchors.options()) : at::empty({0}, x.anchors.options());
  at::Tensor grad_keys =
      needs_keys ? at::zeros(x.keys->sizes(), x.anchors.options()) : at::empty({0}, x.anchors.options());
  patch_contrast_backward(
      arguments.inputs, rows, max_logit.contiguous().const_data_ptr<scalar_t>(),
      log_sum.contiguous().const_data_ptr<scalar_t>(), num_positives.contiguous().const_data_ptr<int32_t>(),
      needs_anchors ? grad_anchors.data_ptr() : nullptr, needs_keys ? grad_keys.data_ptr() : nullptr, torch_threads());
  return {grad_anchors, grad_keys};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& max_logit,
                                            const at::Tensor& log_sum, const at::Tensor& num_positives,
                                            const at::Tensor& num_valid, PGLCL_CONTRAST_PARAMETERS, bool needs_anchors,
                                            bool needs_keys) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  const auto run = x.accumulate_type() == at::kDouble ? backward_typed<double> : backward_typed<float>;
  return run(grad, max_logit, log_sum, num_positives, num_valid, x, needs_anchors, needs_keys);
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("patch_contrast", forward);
  m.impl("patch_contrast_backward", backward);
}

}  // namespace pglcl
