// CUDA implementation of the op patch_statistics: check, allocate, launch.
#include "kernels/patch_statistics.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& input, at::IntArrayRef patch_size,
                                                       at::IntArrayRef stride, bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const DeviceGuard guard(input);
  const at::Tensor contiguous = input.contiguous();
  at::Tensor entropy = at::empty(patch_grid_shape(input, grid, false), contiguous.options());
  at::Tensor confidence = at::empty(patch_grid_shape(input, grid, true), contiguous.options());
  at::Tensor class_entropy = at::empty_like(confidence);
  with_element_type(input, [&]<typename T>() {
    cuda::run_statistics_forward<T>(
        {input_of<T>(contiguous), output_of<T>(entropy), output_of<T>(confidence), output_of<T>(class_entropy), grid,
         probabilities, normalize, std::log(double(grid.classes))},
        current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {entropy, confidence, class_entropy};
}

at::Tensor backward(const at::Tensor& grad_entropy, const at::Tensor& grad_confidence,
                    const at::Tensor& grad_class_entropy, const at::Tensor& input, const at::Tensor& confidence,
                    const at::Tensor& class_entropy, at::IntArrayRef patch_size, at::IntArrayRef stride,
                    bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const DeviceGuard guard(input);
  const at::Tensor contiguous = input.contiguous();
  at::Tensor grad_input = at::empty_like(contiguous);
  const at::Tensor c = confidence.contiguous(), h = class_entropy.contiguous();
  const at::Tensor ge = grad_entropy.contiguous(), gc = grad_confidence.contiguous(),
                   gh = grad_class_entropy.contiguous();
  with_element_type(input, [&]<typename T>() {
    cuda::run_statistics_backward<T>(
        {input_of<T>(contiguous), input_of<T>(c), input_of<T>(h), input_of<T>(ge), input_of<T>(gc), input_of<T>(gh),
         output_of<T>(grad_input), grid, probabilities, normalize, std::log(double(grid.classes))},
        current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("patch_statistics", forward);
  m.impl("patch_statistics_backward", backward);
}

}  // namespace pglcl
