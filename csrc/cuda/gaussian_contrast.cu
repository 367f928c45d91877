// CUDA implementation of the op gaussian_contrast: check, allocate, launch. Nothing here waits for the device.
#include "kernels/gaussian_contrast.cuh"

#include <cmath>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(PGLCL_GAUSSIAN_PARAMETERS) {
  const GaussianContrastArgs x PGLCL_GAUSSIAN_ARGUMENTS;
  require_gaussian_contrast(x);
  const DeviceGuard guard(anchors);
  const ScalarType type = accumulate_type(anchors);
  const int64_t n = anchors.size(0), depth = anchors.size(1), k = counts.size(0);
  const bool pairwise = means.dim() == 3;
  const Tensor rows = as_contiguous(anchors), classes = as_contiguous(labels), keys = as_contiguous(counts);
  const Tensor centres = as_contiguous(means, type), given = as_contiguous(covariances, type);
  const Tensor symmetric = empty(given, shape_of(given), type);
  // Sorted, so that most blocks have anchors of one class and read one covariance for all of them.
  const OptionalTensor order = pairwise ? OptionalTensor(stable_sort(classes).second) : std::nullopt;

  const int64_t shared = device_attribute(DeviceAttribute::kSharedBytes);
  const auto fits = [&](int64_t columns) {
    return with_accumulate_type(
        anchors, [&]<typename scalar_t>() { return cuda::gaussian_rows_per_block<scalar_t>(columns, shared) > 0; });
  };
  int64_t most = depth;
  while (!fits(most)) --most;
  PGLCL_CHECK_LIMIT(most == depth, "anchors must have at most ", most, " columns on this GPU, got ", depth);
  const Tensor losses = empty(anchors, {n}, type), count = empty(anchors, {n}, ScalarType::Int);
  const Tensor num_valid = empty(anchors, {}, ScalarType::Long);
  const Tensor gradients = empty(anchors, {needs_gradients ? n : 0, depth}, type);
  const Tensor loss = reduction == kNone ? losses : empty(anchors, {}, type);
  with_element_type(anchors, [&]<typename T>() {
    using scalar_t = typename Accumulate<T>::type;
    const auto stream = current_stream();
    cuda::run_symmetric_part(input_of<scalar_t>(given), output_of<scalar_t>(symmetric), pairwise ? k * k : k, depth,
                             stream);
    const cuda::GaussianArguments<T> inputs{input_of<T>(rows),
                                            n,
                                            depth,
                                            k,
                                            input_of<int64_t>(classes),
                                            input_of<int64_t>(order),
                                            input_of<scalar_t>(centres),
                                            input_of<scalar_t>(symmetric),
                                            input_of<int64_t>(keys),
                                            pairwise,
                                            ignore_index};
    const cuda::GaussianNumbers<double> numbers{1 / temperature, covariance_scale / (temperature * temperature),
                                                std::log2(negative_weight)};
    const cuda::GaussianOutputs<T> outputs{output_of<scalar_t>(losses), output_of<int32_t>(count),
                                           needs_gradients ? output_of<scalar_t>(gradients) : nullptr};
    cuda::run_gaussian_contrast<T>(inputs, numbers, shared, outputs, reduction == kMean,
                                   reduction == kNone ? nullptr : output_of<scalar_t>(loss),
                                   output_of<int64_t>(num_valid), stream);
  });
  PGLCL_CHECK_LAUNCH();
  return {loss, gradients, num_valid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) { m.impl("gaussian_contrast", TORCH_BOX(&forward)); }

}  // namespace pglcl
