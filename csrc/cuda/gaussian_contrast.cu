// CUDA implementation of the op gaussian_contrast: check, allocate, launch. Nothing here waits for the device.
#include "kernels/gaussian_contrast.cuh"

#include <ATen/TensorOperators.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(PGLCL_GAUSSIAN_PARAMETERS) {
  const GaussianContrastArgs x PGLCL_GAUSSIAN_ARGUMENTS;
  check_gaussian_contrast(x);
  const DeviceGuard guard(anchors);
  const at::ScalarType type = x.accumulate_type();
  const int64_t n = anchors.size(0), depth = anchors.size(1);
  const bool pairwise = means.dim() == 3;
  const at::Tensor rows = anchors.contiguous(), classes = labels.contiguous(), keys = counts.contiguous();
  const at::Tensor centres = means.to(type).contiguous(), wide = covariances.to(type);
  // Only the symmetric part has a quadratic form.
  const at::Tensor symmetric = ((wide + wide.transpose(-1, -2)) / 2).contiguous();
  // A block whose anchors are of one class reads one covariance for all of them.
  const at::Tensor order = pairwise ? at::argsort(classes, /*stable=*/true, 0, false) : at::Tensor();

  const int64_t shared = device_attribute(DeviceAttribute::kSharedBytes);
  const bool fits = type == at::kDouble ? cuda::gaussian_rows_per_block<double>(depth, shared) > 0
                                        : cuda::gaussian_rows_per_block<float>(depth, shared) > 0;
  TORCH_CHECK_VALUE(fits, "anchors must have rows that fit the shared memory of the GPU, ", shared,
                    " bytes, three times; got ", anchors.sizes());
  const at::TensorOptions options = anchors.options().dtype(type);
  at::Tensor losses = at::empty({n}, options);
  at::Tensor count = at::empty({n}, options.dtype(at::kInt)), num_valid = at::empty({}, options.dtype(at::kLong));
  at::Tensor gradients = at::empty({needs_gradients ? n : 0, depth}, options);
  at::Tensor loss = reduction == kNone ? losses : at::empty({}, options);
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const cuda::GaussianArguments<T> inputs{input_of<T>(rows),
                                            n,
                                            depth,
                                            counts.size(0),
                                            input_of<int64_t>(classes),
                                            input_of<int64_t>(order),
                                            input_of<scalar_t>(centres),
                                            input_of<scalar_t>(symmetric),
                                            input_of<int64_t>(keys),
                                            pairwise,
                                            scalar_t(1 / temperature),
                                            scalar_t(covariance_scale / (temperature * temperature)),
                                            scalar_t(negative_weight),
                                            ignore_index};
    cuda::run_gaussian_contrast<T>(inputs, shared, output_of<scalar_t>(losses), output_of<int32_t>(count),
                                   needs_gradients ? output_of<scalar_t>(gradients) : nullptr, reduction == kMean,
                                   reduction == kNone ? nullptr : output_of<scalar_t>(loss),
                                   output_of<int64_t>(num_valid), current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {loss, gradients, num_valid};
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) { m.impl("gaussian_contrast", forward); }

}  // namespace pglcl
