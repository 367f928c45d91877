// CUDA implementation of the op patch_contrast: check, allocate, launch. Nothing here waits for the device.
#include "kernels/patch_contrast_launch.cuh"

#include <cmath>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

// The rows for the fast kernels, which read 16 bytes at once. Rows are copied if their length or address is no multiple
// of that (zeros are added to each row), or if they are long and of 16 bits (they are widened). The plain kernels need
// no copy, but are far slower.
Tensor aligned_rows(const Tensor& t) {
  const bool widened = cuda::widens(t.size(1), int64_t(t.element_size()));
  const Tensor rows = as_contiguous(t, widened ? ScalarType::Float : t.scalar_type());
  const int64_t elements = 16 / int64_t(rows.element_size()), depth = rows.size(1);
  if (rows.scalar_type() == ScalarType::Double || depth == 0) return rows;
  if (depth % elements) {
    const Shape zeros{0, elements - depth % elements};
    return torch::stable::pad(rows, IntArray(zeros.data(), zeros.size()));
  }
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 ? torch::stable::clone(rows) : rows;
}

// The inputs as the kernels read them, and the tensors that keep them alive.
struct Arguments {
  const PatchContrastArgs& x;
  bool symmetric;
  Tensor anchors, keys, labels, key_labels;
  OptionalTensor descriptors, key_descriptors, positive_bounds, negative_bounds;

  explicit Arguments(const PatchContrastArgs& args)
      : x(args),
        symmetric(!x.keys),
        anchors(aligned_rows(x.anchors)),
        keys(symmetric ? anchors : aligned_rows(*x.keys)),
        labels(as_contiguous(x.labels)),
        key_labels(symmetric ? labels : as_contiguous(*x.key_labels)),
        descriptors(converted(x.descriptors, accumulate_type(x.anchors))),
        key_descriptors(symmetric ? descriptors : converted(x.key_descriptors, accumulate_type(x.anchors))),
        positive_bounds(converted(x.positive_bounds, accumulate_type(x.anchors))),
        negative_bounds(converted(x.negative_bounds, accumulate_type(x.anchors))) {}

  // TF32 holds all numbers that were widened, so it may be used whatever the switch.
  cuda::DeviceLimits limits() const {
    const bool widened = anchors.scalar_type() != x.anchors.scalar_type();
    return {compiled_for(cuda::contrast_reduce<float>), device_attribute(DeviceAttribute::kSharedBytes),
            x.allow_tf32 || widened, device_attribute(DeviceAttribute::kMultiprocessors)};
  }

  template <typename T>
  cuda::ContrastArguments<T> get() const {
    using scalar_t = typename Accumulate<T>::type;
    cuda::ContrastArguments<T> out{};
    out.anchors = input_of<T>(anchors);
    out.keys = input_of<T>(keys);
    out.n = anchors.size(0);
    out.m = keys.size(0);
    out.depth = anchors.size(1);
    out.labels = input_of<int64_t>(labels);
    out.key_labels = input_of<int64_t>(key_labels);
    out.descriptors = input_of<scalar_t>(descriptors);
    out.key_descriptors = input_of<scalar_t>(key_descriptors);
    out.channels = descriptors && descriptors->dim() == 2 ? descriptors->size(1) : 1;
    out.positive_bound = scalar_t(x.positive_bound);
    out.negative_bound = scalar_t(x.negative_bound);
    out.positive_bounds = input_of<scalar_t>(positive_bounds);
    out.negative_bounds = input_of<scalar_t>(negative_bounds);
    if (x.positive_mask) {
      out.positive_mask = input_of<uint8_t>(*x.positive_mask);
      out.negative_mask = input_of<uint8_t>(*x.negative_mask);
      for (int d = 0; d < 2; ++d) {
        out.positive_stride[d] = x.positive_mask->stride(d);
        out.negative_stride[d] = x.negative_mask->stride(d);
      }
    }
    out.inverse_temperature = scalar_t(1 / x.temperature);
    out.exact_inverse_temperature = 1 / x.temperature;
    out.log_weight = scalar_t(std::log(x.negative_weight));
    out.exact_log_weight = std::log(x.negative_weight);
    out.ignore_index = x.ignore_index;
    out.self_offset = symmetric ? 0 : x.self_offset;
    return out;
  }
};

ContrastOutputs forward(PGLCL_CONTRAST_PARAMETERS) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  require_contrast(x);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  const int64_t n = anchors.size(0);
  const ScalarType type = accumulate_type(anchors);
  const Tensor max_logit = empty(anchors, {n}, ScalarType::Double), log_sum = empty(anchors, {n}, type);
  const Tensor positive_logit = empty(anchors, {n}, type), losses = empty(anchors, {n}, type);
  const Tensor num_positives = empty(anchors, {n}, ScalarType::Int), num_valid = empty(anchors, {}, ScalarType::Long);
  const Tensor loss = reduction == kNone ? losses : empty(anchors, {}, type);
  with_element_type(arguments.anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::ContrastSums<scalar_t> sums{output_of<double>(max_logit), output_of<scalar_t>(log_sum),
                                            output_of<scalar_t>(positive_logit), output_of<int32_t>(num_positives),
                                            output_of<scalar_t>(losses)};
    const cuda::ContrastArguments<T> inputs = arguments.get<T>();
    const cuda::DeviceLimits device = arguments.limits();
    const int64_t parts = cuda::contrast_parts_size(cuda::contrast_part_count(inputs, device), n);
    const Tensor workspace = empty(anchors, {parts}, ScalarType::Float);
    cuda::run_contrast_forward<T>(inputs, device, sums, parts ? output_of<float>(workspace) : nullptr,
                                  reduction == kMean, reduction == kNone ? nullptr : output_of<scalar_t>(loss),
                                  output_of<int64_t>(num_valid), current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {loss, max_logit, log_sum, positive_logit, num_positives, num_valid};
}

// Memory for a gradient, as the kernels write it; empty if it is not needed.
Tensor gradient_of(const Tensor& rows, bool needed) { return empty(rows, needed ? shape_of(rows) : Shape{0}); }

// The gradient of the caller's rows: without the zeros that were added to them, and in their dtype.
Tensor gradient_like(const Tensor& rows, Tensor gradient) {
  if (gradient.dim() == 2 && gradient.size(1) != rows.size(1))
    gradient = torch::stable::contiguous(torch::stable::narrow(gradient, 1, 0, rows.size(1)));
  return cast(gradient, rows.scalar_type());
}

// A gradient, with the memory `sums` (count, rows, depth) of its parts.
template <typename T>
cuda::GradientParts<T> gradient_parts(const Tensor& gradient, const Tensor& sums, int count) {
  return {count > 1 ? output_of<float>(sums) : nullptr, output_of<T>(gradient), gradient.numel(), count};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& max_logit, const Tensor& log_sum,
                                    const Tensor& num_positives, const Tensor& num_valid, PGLCL_CONTRAST_PARAMETERS,
                                    bool needs_anchors, bool needs_keys) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  require_contrast(x);
  require_contrast_backward(x, grad, max_logit, log_sum, num_positives, num_valid);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  needs_keys = needs_keys && !arguments.symmetric;
  // The backward pass of a sum gives one number, expanded to every anchor.
  const bool one_grad = grad.numel() > 0 && (grad.dim() == 0 || grad.stride(0) == 0);
  const Tensor wide_grad =
      as_contiguous(one_grad && grad.dim() ? torch::stable::select(grad, 0, 0) : grad, accumulate_type(anchors));
  const Tensor saved_max = as_contiguous(max_logit), saved_sum = as_contiguous(log_sum);
  const Tensor saved_count = as_contiguous(num_positives);
  const Tensor grad_anchors = gradient_of(arguments.anchors, needs_anchors);
  const Tensor grad_keys = gradient_of(arguments.keys, needs_keys);
  with_element_type(arguments.anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::ContrastArguments<T> inputs = arguments.get<T>();
    const cuda::DeviceLimits device = arguments.limits();
    const cuda::ContrastGradients<scalar_t> gradients{input_of<scalar_t>(wide_grad),
                                                      !one_grad,
                                                      reduction == kMean ? input_of<int64_t>(num_valid) : nullptr,
                                                      input_of<double>(saved_max),
                                                      input_of<scalar_t>(saved_sum),
                                                      input_of<int32_t>(saved_count)};
    const int of_anchors = needs_anchors ? cuda::gradient_part_count(inputs, device, true) : 1;
    const int of_keys = needs_keys ? cuda::gradient_part_count(inputs, device, false) : 1;
    const auto room = [&](int count, const Tensor& gradient) {
      return empty(anchors, {count > 1 ? count * gradient.numel() : 0}, ScalarType::Float);
    };
    const Tensor anchor_sums = room(of_anchors, grad_anchors), key_sums = room(of_keys, grad_keys);
    const auto anchor_parts = gradient_parts<T>(grad_anchors, anchor_sums, of_anchors);
    const auto key_parts = gradient_parts<T>(grad_keys, key_sums, of_keys);
    const auto stream = current_stream();
    if (needs_anchors)
      cuda::run_contrast_backward(inputs, gradients, device, anchor_parts, true, arguments.symmetric, stream);
    if (needs_keys) cuda::run_contrast_backward(inputs, gradients, device, key_parts, false, true, stream);
    cuda::run_finish_gradients(inputs, gradients, anchor_parts, key_parts, arguments.symmetric, stream);
  });
  PGLCL_CHECK_LAUNCH();
  return {gradient_like(anchors, grad_anchors), gradient_like(keys ? *keys : anchors, grad_keys)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("patch_contrast", TORCH_BOX(&forward));
  m.impl("patch_contrast_backward", TORCH_BOX(&backward));
}

}  // namespace pglcl
