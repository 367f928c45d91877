// The op patch_statistics on the CPU: check, allocate, run the passes (patch_statistics_passes.cpp).
#include "patch_statistics.h"

#include "../checks.h"
#include "huge_pages.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, IntArray patch_size, IntArray stride,
                                           bool probabilities, bool normalize) {
  const PatchGrid grid = require_patch_grid(input, patch_size, stride);
  const Tensor image = as_contiguous(input);
  const Shape patches = patch_grid_shape(input, grid, false), classes = patch_grid_shape(input, grid, true);
  const ScalarType type = accumulate_type(input);
  const Tensor entropy = empty(input, patches, type), confidence = empty(input, classes, type);
  const Tensor class_entropy = empty(input, classes, type);
  const StatisticsInputs inputs{grid, image.const_data_ptr(), input.scalar_type(), probabilities, normalize};
  with_accumulate_type(input, [&]<typename scalar_t>() {
    patch_statistics_forward<scalar_t>(
        inputs,
        {mutable_data<scalar_t>(entropy), mutable_data<scalar_t>(confidence), mutable_data<scalar_t>(class_entropy)},
        torch_threads());
  });
  return {entropy, confidence, class_entropy};
}

Tensor backward(const Tensor& grad_entropy, const Tensor& grad_confidence, const Tensor& grad_class_entropy,
                const Tensor& input, const Tensor& confidence, const Tensor& class_entropy, IntArray patch_size,
                IntArray stride, bool probabilities, bool normalize) {
  const PatchGrid grid = require_patch_grid(input, patch_size, stride);
  const Shape patches = patch_grid_shape(input, grid, false), classes = patch_grid_shape(input, grid, true);
  const ScalarType type = accumulate_type(input);
  require_tensor(grad_entropy, "grad_entropy", input, type, patches);
  require_tensor(grad_confidence, "grad_confidence", input, type, classes);
  require_tensor(grad_class_entropy, "grad_class_entropy", input, type, classes);
  require_tensor(confidence, "confidence", input, type, classes);
  require_tensor(class_entropy, "class_entropy", input, type, classes);
  const Tensor image = as_contiguous(input), c = as_contiguous(confidence), h = as_contiguous(class_entropy);
  const Tensor ge = as_contiguous(grad_entropy), gc = as_contiguous(grad_confidence),
               gh = as_contiguous(grad_class_entropy);
  const Tensor grad_input = empty(input, shape_of(input), input.scalar_type());
  advise_huge_pages(grad_input.mutable_data_ptr(), grad_input.numel() * int64_t(grad_input.element_size()));
  const StatisticsInputs inputs{grid, image.const_data_ptr(), input.scalar_type(), probabilities, normalize};
  with_accumulate_type(input, [&]<typename scalar_t>() {
    patch_statistics_backward<scalar_t>(inputs, data<scalar_t>(c), data<scalar_t>(h),
                                        {data<scalar_t>(ge), data<scalar_t>(gc), data<scalar_t>(gh)},
                                        grad_input.mutable_data_ptr(), torch_threads());
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("patch_statistics", TORCH_BOX(&forward));
  m.impl("patch_statistics_backward", TORCH_BOX(&backward));
}

}  // namespace pglcl
