// The op gaussian_contrast on the CPU: check, allocate, run the tiles (gaussian_contrast_passes.cpp), reduce.
//
// The backward op is only a product then. It is the same on every device, and is in gaussian_contrast.py.
#include "gaussian_contrast.h"

#include "../checks.h"
#include "reduction.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(PGLCL_GAUSSIAN_PARAMETERS) {
  const GaussianContrastArgs x PGLCL_GAUSSIAN_ARGUMENTS;
  require_gaussian_contrast(x);
  const int64_t n = anchors.size(0), depth = anchors.size(1), k = counts.size(0);
  const bool pairwise = means.dim() == 3;
  const ScalarType type = accumulate_type(anchors);
  const Tensor rows = as_contiguous(anchors), own = as_contiguous(labels), number = as_contiguous(counts);
  const Tensor mean = as_contiguous(means, type), covariance = as_contiguous(covariances, type);
  const Tensor gradients = empty(anchors, {needs_gradients ? n : 0, depth}, type);
  return with_accumulate_type(anchors, [&]<typename scalar_t>() -> std::tuple<Tensor, Tensor, Tensor> {
    const GaussianInputs<scalar_t> inputs{rows.const_data_ptr(),
                                          rows.scalar_type(),
                                          n,
                                          depth,
                                          k,
                                          data<int64_t>(own),
                                          data<scalar_t>(mean),
                                          data<scalar_t>(covariance),
                                          data<int64_t>(number),
                                          pairwise,
                                          temperature,
                                          covariance_scale,
                                          negative_weight,
                                          ignore_index};
    require(find_bad_label(inputs) < 0, "labels");
    const Arena::Call call;
    Losses<scalar_t> losses(anchors, reduction);
    const int64_t valid = gaussian_contrast(
        inputs, losses.data(), needs_gradients ? mutable_data<scalar_t>(gradients) : nullptr, torch_threads());
    const Tensor num_valid = cpu_scalar<int64_t>(anchors, ScalarType::Long, valid);
    return {losses.reduced(valid), gradients, num_valid};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) { m.impl("gaussian_contrast", TORCH_BOX(&forward)); }

}  // namespace pglcl
