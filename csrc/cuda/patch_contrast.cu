// CUDA implementation of the op patch_contrast: check, allocate, launch. Nothing here waits for the device.
#include "kernels/patch_contrast_launch.cuh"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

at::Tensor converted(const std::optional<at::Tensor>& t, at::ScalarType type) {
  return t ? t->to(type).contiguous() : at::Tensor();
}

cuda::DeviceLimits limits() {
  return {
      device_attribute(DeviceAttribute::kCapabilityMajor) * 10 + device_attribute(DeviceAttribute::kCapabilityMinor),
      device_attribute(DeviceAttribute::kSharedBytes), at::globalContext().allowTF32CuBLAS()};
}

// The inputs as the kernels read them, and the tensors that keep them alive.
struct Arguments {
  at::Tensor anchors, keys, labels, key_labels, descriptors, key_descriptors, positive_bounds, negative_bounds;
  const PatchContrastArgs& x;
  bool symmetric;

  explicit Arguments(const PatchContrastArgs& args) : x(args), symmetric(!args.keys) {
    const at::ScalarType type = x.accumulate_type();
    anchors = x.anchors.contiguous();
    keys = symmetric ? anchors : x.keys->contiguous();
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
    out.scale = scalar_t(cuda::kLog2E / x.temperature);
    out.temperature = scalar_t(x.temperature);
    out.negative_weight = scalar_t(x.negative_weight);
    out.ignore_index = x.ignore_index;
    out.self_offset = symmetric ? 0 : x.self_offset;
    return out;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(PGLCL_CONTRAST_PARAMETERS) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  check_patch_contrast(x);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  const int64_t n = anchors.size(0);
  const at::TensorOptions options = anchors.options().dtype(x.accumulate_type());
  at::Tensor lse = at::empty({n}, options), positive_logit = at::empty({n}, options);
  at::Tensor num_positives = at::empty({n}, options.dtype(at::kInt));
  at::Tensor num_valid = at::empty({}, options.dtype(at::kLong));
  at::Tensor loss = at::empty(reduction == kNone ? at::IntArrayRef(n) : at::IntArrayRef{}, options);
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    cuda::run_contrast_forward<T>(arguments.get<T>(), limits(), output_of<scalar_t>(lse),
                                  output_of<scalar_t>(positive_logit), output_of<int32_t>(num_positives),
                                  reduction == kNone, reduction == kMean, output_of<scalar_t>(loss),
                                  output_of<int64_t>(num_valid), current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {loss, lse, positive_logit, num_positives, num_valid};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& lse,
                                            const at::Tensor& num_positives, const at::Tensor& num_valid,
                                            PGLCL_CONTRAST_PARAMETERS, bool needs_anchors, bool needs_keys) {
  const PatchContrastArgs x PGLCL_CONTRAST_ARGUMENTS;
  check_patch_contrast(x);
  const DeviceGuard guard(anchors);
  const Arguments arguments(x);
  needs_keys = needs_keys && !arguments.symmetric;
  const at::Tensor wide_grad = grad.to(x.accumulate_type()).contiguous();
  const at::Tensor saved_lse = lse.contiguous(), saved_count = num_positives.contiguous();
  const at::IntArrayRef nothing{0};
  at::Tensor grad_anchors = at::empty(needs_anchors ? anchors.sizes() : nothing, anchors.options());
  at::Tensor grad_keys = at::empty(needs_keys ? keys->sizes() : nothing, anchors.options());
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::ContrastArguments<T> inputs = arguments.get<T>();
    const cuda::ContrastGradients<scalar_t> gradients{input_of<scalar_t>(wide_grad), reduction == kNone,
                                                      reduction == kMean ? input_of<int64_t>(num_valid) : nullptr,
                                                      input_of<scalar_t>(saved_lse), input_of<int32_t>(saved_count)};
    const auto stream = current_stream();
    if (needs_anchors)
      cuda::run_contrast_backward<T>(inputs, gradients, limits(), output_of<T>(grad_anchors), true, arguments.symmetric,
                                     stream);
    if (needs_keys)
      cuda::run_contrast_backward<T>(inputs, gradients, limits(), output_of<T>(grad_keys), false, true, stream);
  });
  PGLCL_CHECK_LAUNCH();
  return {grad_anchors, grad_keys};
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("patch_contrast", forward);
  m.impl("patch_contrast_backward", backward);
}

}  // namespace pglcl
