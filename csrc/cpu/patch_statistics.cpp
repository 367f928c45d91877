// CPU implementation of the op patch_statistics: check, allocate, call the kernel.
#include "patch_statistics_kernel.h"

#include "huge_pages.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

PatchGrid grid_of(const Tensor& input, const IntArray& patch_size, const IntArray& stride) {
  require_floating(input, "input", input);
  const int64_t dims = input.dim() - 2;
  require((dims == 2 || dims == 3) && input.size(1) >= 2, "input");
  require(int64_t(patch_size.size()) == dims, "patch_size");
  require(int64_t(stride.size()) == dims, "stride");
  PatchGrid grid;
  grid.batch = input.size(0);
  grid.classes = input.size(1);
  for (int d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - dims);
    grid.image[d] = from < 0 ? 1 : input.size(2 + from);
    grid.patch[d] = from < 0 ? 1 : patch_size[from];
    grid.stride[d] = from < 0 ? 1 : stride[from];
    require(grid.patch[d] > 0 && grid.patch[d] <= grid.image[d], "patch_size");
    require(grid.stride[d] > 0, "stride");
    grid.grid[d] = (grid.image[d] - grid.patch[d]) / grid.stride[d] + 1;
  }
  return grid;
}

// (B, *g), or (B, K, *g) with classes.
Shape grid_shape(const Tensor& input, const PatchGrid& grid, bool classes) {
  Shape shape{grid.batch};
  if (classes) shape.push_back(grid.classes);
  for (int64_t d = 5 - input.dim(); d < 3; ++d) shape.push_back(grid.grid[d]);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, IntArray patch_size, IntArray stride,
                                           bool probabilities, bool normalize) {
  const PatchGrid grid = grid_of(input, patch_size, stride);
  const Tensor image = as_contiguous(input);
  const Shape patches = grid_shape(input, grid, false), classes = grid_shape(input, grid, true);
  const ScalarType type = input.scalar_type();
  const Tensor entropy = empty(input, patches, type), confidence = empty(input, classes, type);
  const Tensor class_entropy = empty(input, classes, type);
  const StatisticsInputs inputs{grid, image.const_data_ptr(), dtype_of(input), probabilities, normalize};
  with_accumulate_type(input, [&]<typename scalar_t>() {
    patch_statistics_forward<scalar_t>(
        inputs,
        {entropy.mutable_data_ptr(), confidence.mutable_data_ptr(), class_entropy.mutable_data_ptr(), inputs.dtype},
        torch_threads());
  });
  return {entropy, confidence, class_entropy};
}

Tensor backward(const Tensor& grad_entropy, const Tensor& grad_confidence, const Tensor& grad_class_entropy,
                const Tensor& input, const Tensor& confidence, const Tensor& class_entropy, IntArray patch_size,
                IntArray stride, bool probabilities, bool normalize) {
  const PatchGrid grid = grid_of(input, patch_size, stride);
  const Shape patches = grid_shape(input, grid, false), classes = grid_shape(input, grid, true);
  const ScalarType type = input.scalar_type();
  require_tensor(grad_entropy, "grad_entropy", input, type, patches);
  require_tensor(grad_confidence, "grad_confidence", input, type, classes);
  require_tensor(grad_class_entropy, "grad_class_entropy", input, type, classes);
  require_tensor(confidence, "confidence", input, type, classes);
  require_tensor(class_entropy, "class_entropy", input, type, classes);
  const Tensor image = as_contiguous(input), c = as_contiguous(confidence), h = as_contiguous(class_entropy);
  const Tensor ge = as_contiguous(grad_entropy), gc = as_contiguous(grad_confidence),
               gh = as_contiguous(grad_class_entropy);
  const Tensor grad_input = empty(input, shape_of(input), type);
  advise_huge_pages(grad_input.mutable_data_ptr(), grad_input.numel() * int64_t(grad_input.element_size()));
  const StatisticsInputs inputs{grid, image.const_data_ptr(), dtype_of(input), probabilities, normalize};
  with_accumulate_type(input, [&]<typename scalar_t>() {
    patch_statistics_backward<scalar_t>(inputs, c.const_data_ptr(), h.const_data_ptr(), ge.const_data_ptr(),
                                        gc.const_data_ptr(), gh.const_data_ptr(), grad_input.mutable_data_ptr(),
                                        torch_threads());
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("patch_statistics", TORCH_BOX(&forward));
  m.impl("patch_statistics_backward", TORCH_BOX(&backward));
}

}  // namespace pglcl
