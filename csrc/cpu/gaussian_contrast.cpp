// CPU implementation of the op gaussian_contrast: check, allocate, call the kernel, reduce. Its backward op is a
// product by then, the same on every device, and stands in gaussian_contrast.py.
#include "gaussian_contrast_kernel.h"

#include "reduction.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& anchors, const Tensor& labels, const Tensor& means,
                                           const Tensor& covariances, const Tensor& counts, double temperature,
                                           double covariance_scale, double negative_weight, int64_t ignore_index,
                                           int64_t reduction, bool needs_gradients) {
  require_floating(anchors, "anchors", anchors);
  require(anchors.dim() == 2, "anchors");
  require(counts.dim() == 1, "counts");
  const int64_t n = anchors.size(0), depth = anchors.size(1), k = counts.size(0);
  require_tensor(labels, "labels", anchors, ScalarType::Long, {n});
  require_tensor(counts, "counts", anchors, ScalarType::Long, {k});
  require_floating(means, "means", anchors);
  require_floating(covariances, "covariances", anchors);
  const bool pairwise = means.dim() == 3;
  require(shape_of(means) == (pairwise ? Shape{k, k, depth} : Shape{k, depth}), "means");
  require(shape_of(covariances) == (pairwise ? Shape{k, k, depth, depth} : Shape{k, depth, depth}), "covariances");

  const ScalarType type = accumulate_type(anchors);
  const Tensor rows = as_contiguous(anchors), own = as_contiguous(labels), number = as_contiguous(counts);
  const Tensor mean = as_contiguous(means, type), covariance = as_contiguous(covariances, type);
  const Tensor losses = empty(anchors, {n}, type);
  const Tensor gradients = empty(anchors, {needs_gradients ? n : 0, depth}, type);
  return with_accumulate_type(anchors, [&]<typename scalar_t>() -> std::tuple<Tensor, Tensor, Tensor> {
    const GaussianInputs<scalar_t> inputs{rows.const_data_ptr(),
                                          dtype_of(rows),
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
    const int64_t valid =
        gaussian_contrast(inputs, mutable_data<scalar_t>(losses),
                          needs_gradients ? mutable_data<scalar_t>(gradients) : nullptr, torch_threads());
    const Tensor num_valid = cpu_scalar<int64_t>(anchors, ScalarType::Long, valid);
    return {reduced<scalar_t>(losses, valid, reduction), gradients, num_valid};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) { m.impl("gaussian_contrast", TORCH_BOX(&forward)); }

}  // namespace pglcl
