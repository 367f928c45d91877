// CPU implementation of the op patch_statistics: check, allocate, call the kernel.
#include "patch_statistics_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "huge_pages.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& input, at::IntArrayRef patch_size,
                                                       at::IntArrayRef stride, bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const at::Tensor contiguous = input.contiguous();
  at::Tensor entropy = at::empty(patch_grid_shape(input, grid, false), contiguous.options());
  at::Tensor confidence = at::empty(patch_grid_shape(input, grid, true), contiguous.options());
  at::Tensor class_entropy = at::empty_like(confidence);
  const StatisticsInputs inputs{grid, contiguous.const_data_ptr(), dtype_of(input), probabilities, normalize};
  const auto kernel =
      input.scalar_type() == at::kDouble ? patch_statistics_forward<double> : patch_statistics_forward<float>;
  kernel(inputs, {entropy.data_ptr(), confidence.data_ptr(), class_entropy.data_ptr(), inputs.dtype}, torch_threads());
  return {entropy, confidence, class_entropy};
}

at::Tensor backward(const at::Tensor& grad_entropy, const at::Tensor& grad_confidence,
                    const at::Tensor& grad_class_entropy, const at::Tensor& input, const at::Tensor& confidence,
                    const at::Tensor& class_entropy, at::IntArrayRef patch_size, at::IntArrayRef stride,
                    bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const at::Tensor contiguous = input.contiguous();
  at::Tensor grad_input = at::empty_like(contiguous);
  advise_huge_pages(grad_input);
  const StatisticsInputs inputs{grid, contiguous.const_data_ptr(), dtype_of(input), probabilities, normalize};
  const auto kernel =
      input.scalar_type() == at::kDouble ? patch_statistics_backward<double> : patch_statistics_backward<float>;
  kernel(inputs, confidence.contiguous().const_data_ptr(), class_entropy.contiguous().const_data_ptr(),
         grad_entropy.contiguous().const_data_ptr(), grad_confidence.contiguous().const_data_ptr(),
         grad_class_entropy.contiguous().const_data_ptr(), grad_input.data_ptr(), torch_threads());
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("patch_statistics", forward);
  m.impl("patch_statistics_backward", backward);
}

}  // namespace pglcl
