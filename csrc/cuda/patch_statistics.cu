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

// Where the elements of a tensor lie: (B, K, *S), or (B, *S) without classes. Nothing is copied, whatever the strides.
template <typename T>
cuda::Strided<T> strided(T* data, const at::Tensor& t, bool classes) {
  cuda::Strided<T> out{data, t.stride(0), classes ? t.stride(1) : 0, {0, 0, 0}};
  const int64_t lead = classes ? 2 : 1, dims = t.dim() - lead;
  for (int64_t d = 0; d < dims; ++d) out.at[3 - dims + d] = t.stride(lead + d);
  return out;
}

template <typename T>
cuda::Strided<const T> strided_input(const at::Tensor& t, bool classes) {
  return strided(input_of<T>(t), t, classes);
}

template <typename T>
cuda::StatisticsInput<T> statistics_input(const at::Tensor& input, const PatchGrid& grid, bool probabilities,
                                          bool normalize) {
  TORCH_CHECK_VALUE(grid.pixels() <= cuda::kMostPixels && grid.classes <= cuda::kMostPixels,
                    "input must have images and classes of fewer than 2^31 numbers on a GPU, got ", input.sizes());
  return {strided_input<T>(input, true), cuda::narrowed(grid), probabilities, normalize,
          std::log(double(grid.classes))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& input, at::IntArrayRef patch_size,
                                                       at::IntArrayRef stride, bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const DeviceGuard guard(input);
  at::Tensor entropy = at::empty(patch_grid_shape(input, grid, false), input.options());
  at::Tensor confidence = at::empty(patch_grid_shape(input, grid, true), input.options());
  at::Tensor class_entropy = at::empty(patch_grid_shape(input, grid, true), input.options());
  with_element_type(input, [&]<typename T>() {
    cuda::run_statistics_forward<T>(statistics_input<T>(input, grid, probabilities, normalize),
                                    {output_of<T>(entropy), output_of<T>(confidence), output_of<T>(class_entropy)},
                                    current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {entropy, confidence, class_entropy};
}

// confidence and class_entropy, which are rounded, are summed again instead of read.
at::Tensor backward(const at::Tensor& grad_entropy, const at::Tensor& grad_confidence,
                    const at::Tensor& grad_class_entropy, const at::Tensor& input, const at::Tensor&, const at::Tensor&,
                    at::IntArrayRef patch_size, at::IntArrayRef stride, bool probabilities, bool normalize) {
  const PatchGrid grid = check_patch_grid(input, patch_size, stride);
  const DeviceGuard guard(input);
  at::Tensor grad_input = at::empty_like(input);
  const at::ScalarType wide = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor coefficients = at::empty({2, grid.batch, grid.classes, grid.patches()}, input.options().dtype(wide));
  with_element_type(input, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    scalar_t* gamma = output_of<scalar_t>(coefficients);
    cuda::run_statistics_backward<T>(
        statistics_input<T>(input, grid, probabilities, normalize), strided_input<T>(grad_entropy, false),
        strided_input<T>(grad_confidence, true), strided_input<T>(grad_class_entropy, true),
        {gamma, gamma + coefficients.stride(0)}, strided(output_of<T>(grad_input), grad_input, true), current_stream());
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
