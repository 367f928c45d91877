// CUDA implementation of the op patch_contrast: check, allocate, launch. Nothing here waits for the device.
#include "kernels/patch_contrast_launch.cuh"

#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

at::Tensor converted(const std::optional<at::Tensor>& t, at::ScalarType type) {
  return t ? t->to(type).contiguous() : at::Tensor();
}

// Whether float32 products may take TF32: PyTorch's own switch, in whichever of its two ways it was set.
bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

cuda::DeviceLimits limits() {
  return {compiled_for(cuda::contrast_reduce<float>), device_attribute(DeviceAttribute::kSharedBytes), tf32_allowed(),
          device_attribute(DeviceAttribute::kMultiprocessors)};
}

// Rows that the fast kernels take: they read 16 bytes at once. A depth that is no multiple of them, or rows that do not
// begin at one, cost a copy, with zeros behind each row; the plain kernels, which need none, are far slower.
at::Tensor aligned_rows(const at::Tensor& t) {
  const at::Tensor rows = t.contiguous();
  const int64_t elements = 16 / rows.element_size(), depth = rows.size(1);
  if (rows.scalar_type() == at::kDouble || depth == 0 || depth > cuda::kMaxDepth) return rows;
  if (depth % elements) return at::constant_pad_nd(rows, {0, elements - depth % elements});
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 ? rows.clone() : rows;
}

// The inputs as the kernels read them, and the tensors that keep them alive.
struct Arguments {
  at::Tensor anchors, keys, labels, key_labels, descriptors, key_descriptors, positive_bounds, negative_bounds;
  const PatchContrastArgs& x;
  bool symmetric;

  explicit Arguments(const PatchContrastArgs& args) : x(args), symmetric(!args.keys) {
    const at::ScalarType type = x.accumulate_type();
    anchors = aligned_rows(x.anchors);
    keys = symmetric ? anchors : aligned_rows(*x.keys);
    labels = x.labels.contiguous();
    key_labels = symmetric ? labels : x.key_labels->contiguous();
    descriptors = converted(x.descriptors, type);
    key_descriptors = symmetric ? descriptors : converted(x.key_descriptors, type);
    positive_bounds = converted(x.positive_bounds, type);
    negative_bounds = converted(x.negative_bounds, type);
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
    out.channels = descriptors.defined() && descriptors.dim() == 2 ? descriptors.size(1) : 1;
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
    out.log_weight = scalar_t(std::log(x.negative_weight));
    out.log_both = scalar_t(std::log1p(x.negative_weight));
    out.ignore_index = x.ignore_index;
    out.self_offset = symmetric ? 0 : x.self_offset;
    return out;
  }
};

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward forward(PGLCL_CONTRAST_PARAMETERS) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  check_patch_contrast(x);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  const int64_t n = anchors.size(0);
  const at::TensorOptions options = anchors.options().dtype(x.accumulate_type());
  at::Tensor max_logit = at::empty({n}, options), log_sum = at::empty({n}, options);
  at::Tensor positive_logit = at::empty({n}, options), losses = at::empty({n}, options);
  at::Tensor num_positives = at::empty({n}, options.dtype(at::kInt));
  at::Tensor num_valid = at::empty({}, options.dtype(at::kLong));
  at::Tensor loss = reduction == kNone ? losses : at::empty({}, options);
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::ContrastSums<scalar_t> sums{output_of<scalar_t>(max_logit), output_of<scalar_t>(log_sum),
                                            output_of<scalar_t>(positive_logit), output_of<int32_t>(num_positives),
                                            output_of<scalar_t>(losses)};
    const cuda::ContrastArguments<T> inputs = arguments.get<T>();
    const cuda::DeviceLimits device = limits();
    const int64_t parts = cuda::contrast_parts_size(cuda::contrast_part_count(inputs, device), n);
    at::Tensor workspace = parts ? at::empty({parts}, options) : at::Tensor();
    cuda::run_contrast_forward<T>(inputs, device, sums, parts ? output_of<float>(workspace) : nullptr,
                                  reduction == kMean, reduction == kNone ? nullptr : output_of<scalar_t>(loss),
                                  output_of<int64_t>(num_valid), current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {loss, max_logit, log_sum, positive_logit, num_positives, num_valid};
}

// A gradient of rows as the kernels write it; empty where nobody asks for it.
at::Tensor gradient_of(const at::Tensor& rows, bool needed) {
  return needed ? at::empty(rows.sizes(), rows.options()) : at::empty({0}, rows.options());
}

// Without what was added to the rows.
at::Tensor cut_to(const at::Tensor& gradient, int64_t depth) {
  return gradient.dim() == 1 || gradient.size(1) == depth ? gradient : gradient.narrow(1, 0, depth).contiguous();
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& max_logit,
                                            const at::Tensor& log_sum, const at::Tensor& num_positives,
                                            const at::Tensor& num_valid, PGLCL_CONTRAST_PARAMETERS, bool needs_anchors,
                                            bool needs_keys) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  check_patch_contrast(x);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  needs_keys = needs_keys && !arguments.symmetric;
  // An expanded gradient, as the backward pass of a sum gives it, is one number.
  const bool one_grad = grad.numel() > 0 && (grad.dim() == 0 || grad.stride(0) == 0);
  const at::Tensor wide_grad = (one_grad && grad.dim() ? grad.select(0, 0) : grad).to(x.accumulate_type()).contiguous();
  const at::Tensor saved_max = max_logit.contiguous(), saved_sum = log_sum.contiguous();
  const at::Tensor saved_count = num_positives.contiguous();
  at::Tensor grad_anchors = gradient_of(arguments.anchors, needs_anchors);
  at::Tensor grad_keys = gradient_of(arguments.keys, needs_keys);
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::ContrastArguments<T> inputs = arguments.get<T>();
    const cuda::ContrastGradients<scalar_t> gradients{input_of<scalar_t>(wide_grad),
                                                      !one_grad,
                                                      reduction == kMean ? input_of<int64_t>(num_valid) : nullptr,
                                                      input_of<scalar_t>(saved_max),
                                                      input_of<scalar_t>(saved_sum),
                                                      input_of<int32_t>(saved_count)};
    const auto stream = current_stream();
    if (needs_anchors)
      cuda::run_contrast_backward<T>(inputs, gradients, limits(), output_of<T>(grad_anchors), true, arguments.symmetric,
                                     stream);
    if (needs_keys)
      cuda::run_contrast_backward<T>(inputs, gradients, limits(), output_of<T>(grad_keys), false, true, stream);
  });
  PGLCL_CHECK_LAUNCH();
  return {cut_to(grad_anchors, anchors.size(1)), cut_to(grad_keys, anchors.size(1))};
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("patch_contrast", forward);
  m.impl("patch_contrast_backward", backward);
}

}  // namespace pglcl
