// CUDA implementation of the op patch_statistics: check, allocate, launch.
#include "kernels/patch_statistics.cuh"

#include <cmath>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

// A tensor (B, K, *S), or (B, *S) without classes, with the strides that it has: nothing is copied.
template <typename T>
cuda::Strided<T> strided(T* data, const Tensor& t, bool classes) {
  cuda::Strided<T> out{data, t.stride(0), classes ? t.stride(1) : 0, {0, 0, 0}};
  const int64_t lead = classes ? 2 : 1, dims = t.dim() - lead;
  for (int64_t d = 0; d < dims; ++d) out.at[3 - dims + d] = t.stride(lead + d);
  return out;
}

template <typename T>
cuda::Strided<const T> strided_input(const Tensor& t, bool classes) {
  return strided(input_of<T>(t), t, classes);
}

template <typename T>
cuda::StatisticsInput<T> statistics_input(const Tensor& input, const PatchGrid& grid, bool probabilities,
                                          bool normalize) {
  PGLCL_CHECK_LIMIT(grid.pixels() <= cuda::kMostPixels && grid.classes <= cuda::kMostPixels,
                    "input must have fewer than 2^31 pixels in an image, and fewer than 2^31 classes, on a GPU; got ",
                    grid.pixels(), " pixels and ", grid.classes, " classes");
  return {strided_input<T>(input, true), cuda::narrowed(grid), probabilities, normalize,
          std::log(double(grid.classes))};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, IntArray patch_size, IntArray stride,
                                           bool probabilities, bool normalize) {
  const PatchGrid grid = require_patch_grid(input, patch_size, stride);
  const DeviceGuard guard(input);
  const ScalarType type = accumulate_type(input);
  const Tensor entropy = empty(input, patch_grid_shape(input, grid, false), type);
  const Tensor confidence = empty(input, patch_grid_shape(input, grid, true), type);
  const Tensor class_entropy = empty(input, patch_grid_shape(input, grid, true), type);
  with_element_type(input, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    cuda::run_statistics_forward<T>(
        statistics_input<T>(input, grid, probabilities, normalize),
        {output_of<scalar_t>(entropy), output_of<scalar_t>(confidence), output_of<scalar_t>(class_entropy)},
        current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return {entropy, confidence, class_entropy};
}

// confidence and class_entropy are not read. They are summed again, to keep the digits of the smallest probabilities.
Tensor backward(const Tensor& grad_entropy, const Tensor& grad_confidence, const Tensor& grad_class_entropy,
                const Tensor& input, const Tensor&, const Tensor&, IntArray patch_size, IntArray stride,
                bool probabilities, bool normalize) {
  const PatchGrid grid = require_patch_grid(input, patch_size, stride);
  const ScalarType type = accumulate_type(input);
  require_tensor(grad_entropy, "grad_entropy", input, type, patch_grid_shape(input, grid, false));
  require_tensor(grad_confidence, "grad_confidence", input, type, patch_grid_shape(input, grid, true));
  require_tensor(grad_class_entropy, "grad_class_entropy", input, type, patch_grid_shape(input, grid, true));
  const DeviceGuard guard(input);
  const Tensor grad_input = torch::stable::empty_like(input);
  const Tensor coefficients = empty(input, {2, grid.batch, grid.classes, grid.patches()}, type);
  with_element_type(input, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    scalar_t* gamma = output_of<scalar_t>(coefficients);
    cuda::run_statistics_backward<T>(
        statistics_input<T>(input, grid, probabilities, normalize), strided_input<scalar_t>(grad_entropy, false),
        strided_input<scalar_t>(grad_confidence, true), strided_input<scalar_t>(grad_class_entropy, true),
        {gamma, gamma + coefficients.stride(0)}, strided(output_of<T>(grad_input), grad_input, true), current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("patch_statistics", TORCH_BOX(&forward));
  m.impl("patch_statistics_backward", TORCH_BOX(&backward));
}

}  // namespace pglcl
