// The op patch_contrast on the CPU: check, allocate, run the passes (patch_contrast_passes.cpp), reduce.
#include "patch_contrast.h"

#include <algorithm>

#include "../checks.h"
#include "reduction.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// The inputs of the passes, and the tensors that keep their memory alive.
template <typename scalar_t>
struct Arguments {
  Tensor anchors, labels;
  OptionalTensor keys, key_labels, descriptors, key_descriptors, positive_bounds, negative_bounds;
  ContrastInputs<scalar_t> inputs;

  explicit Arguments(const PatchContrastArgs& x)
      : anchors(as_contiguous(x.anchors)),
        labels(as_contiguous(x.labels)),
        keys(converted(x.keys, x.anchors.scalar_type())),
        key_labels(converted(x.key_labels, ScalarType::Long)),
        descriptors(converted(x.descriptors, accumulate_type(x.anchors))),
        key_descriptors(converted(x.key_descriptors, accumulate_type(x.anchors))),
        positive_bounds(converted(x.positive_bounds, accumulate_type(x.anchors))),
        negative_bounds(converted(x.negative_bounds, accumulate_type(x.anchors))),
        inputs{} {
    inputs.anchors = {anchors.const_data_ptr(), anchors.scalar_type(), anchors.size(0)};
    if (keys) inputs.keys = {address(*keys), keys->scalar_type(), keys->size(0)};
    inputs.depth = anchors.size(1);
    inputs.labels = data<int64_t>(labels);
    inputs.key_labels = data_or_null<int64_t>(key_labels);
    inputs.descriptors = data_or_null<scalar_t>(descriptors);
    inputs.key_descriptors = data_or_null<scalar_t>(key_descriptors);
    inputs.channels = descriptors && descriptors->dim() == 2 ? descriptors->size(1) : 1;
    inputs.positive_bound = scalar_t(x.positive_bound);
    inputs.negative_bound = scalar_t(x.negative_bound);
    inputs.positive_bounds = data_or_null<scalar_t>(positive_bounds);
    inputs.negative_bounds = data_or_null<scalar_t>(negative_bounds);
    if (x.positive_mask) {
      inputs.masks = {static_cast<const bool*>(address(*x.positive_mask)),
                      static_cast<const bool*>(address(*x.negative_mask)),
                      {x.positive_mask->stride(0), x.positive_mask->stride(1)},
                      {x.negative_mask->stride(0), x.negative_mask->stride(1)}};
    }
    inputs.temperature = x.temperature;
    inputs.negative_weight = x.negative_weight;
    inputs.ignore_index = x.ignore_index;
    inputs.self_offset = x.self_offset;
  }

 private:
  // An empty tensor has no address, but null would mean that there are no keys or masks.
  const void* address(const Tensor& t) const { return t.numel() ? t.const_data_ptr() : &inputs; }
};

ContrastOutputs forward(PGLCL_CONTRAST_PARAMETERS) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  require_contrast(x);
  const int64_t n = anchors.size(0);
  const ScalarType type = accumulate_type(anchors);
  const Tensor max_logit = empty(anchors, {n}, ScalarType::Double), log_sum = empty(anchors, {n}, type);
  const Tensor positive_logit = empty(anchors, {n}, type);
  const Tensor num_positives = empty(anchors, {n}, ScalarType::Int);
  return with_accumulate_type(anchors, [&]<typename scalar_t>() -> ContrastOutputs {
    const Arena::Call call;
    const Arguments<scalar_t> arguments(x);
    Losses<scalar_t> losses(anchors, reduction);
    Buffer<scalar_t> top(n);
    const AnchorSums<scalar_t> sums{losses.data(), top.data(), mutable_data<scalar_t>(log_sum),
                                    mutable_data<scalar_t>(positive_logit), mutable_data<int32_t>(num_positives)};
    patch_contrast_forward(arguments.inputs, sums, torch_threads());
    std::copy_n(top.data(), n, mutable_data<double>(max_logit));
    const int64_t valid = n - std::count(sums.num_positives, sums.num_positives + n, 0);
    const Tensor num_valid = cpu_scalar<int64_t>(anchors, ScalarType::Long, valid);
    return {losses.reduced(valid), max_logit, log_sum, positive_logit, num_positives, num_valid};
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& max_logit, const Tensor& log_sum,
                                    const Tensor& num_positives, const Tensor& num_valid, PGLCL_CONTRAST_PARAMETERS,
                                    bool needs_anchors, bool needs_keys) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  require_contrast(x);
  const int64_t n = anchors.size(0);
  const ScalarType type = accumulate_type(anchors);
  require_contrast_backward(x, grad, max_logit, log_sum, num_positives, num_valid);
  const Tensor wide_grad = as_contiguous(grad, type), top = as_contiguous(max_logit), sum = as_contiguous(log_sum);
  const Tensor positives = as_contiguous(num_positives);
  needs_keys = needs_keys && keys.has_value();
  const Tensor grad_anchors = zeros(anchors, needs_anchors ? shape_of(anchors) : Shape{0}, anchors.scalar_type());
  const Tensor grad_keys = zeros(anchors, needs_keys ? shape_of(*keys) : Shape{0}, anchors.scalar_type());
  const double share = reduction == kMean ? double(std::max<int64_t>(*data<int64_t>(num_valid), 1)) : 1.0;
  with_accumulate_type(anchors, [&]<typename scalar_t>() {
    const Arena::Call call;
    const Arguments<scalar_t> arguments(x);
    const scalar_t* from = data<scalar_t>(wide_grad);
    Buffer<scalar_t> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = scalar_t(double(from[reduction == kNone ? i : 0]) / share);
    Buffer<scalar_t> saved_top(n);
    std::copy_n(data<double>(top), n, saved_top.data());
    patch_contrast_backward(arguments.inputs, rows.data(), saved_top.data(), data<scalar_t>(sum),
                            data<int32_t>(positives), needs_anchors ? grad_anchors.mutable_data_ptr() : nullptr,
                            needs_keys ? grad_keys.mutable_data_ptr() : nullptr, torch_threads());
  });
  return {grad_anchors, grad_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("patch_contrast", TORCH_BOX(&forward));
  m.impl("patch_contrast_backward", TORCH_BOX(&backward));
}

}  // namespace pglcl
