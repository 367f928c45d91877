// The ops semantic_disparity and disparity_bounds on the CPU: check, allocate, run the passes
// (semantic_disparity_passes.cpp).
#include "semantic_disparity.h"

#include "../checks.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

Tensor wide(const Tensor& t) { return as_contiguous(t, accumulate_type(t)); }

Tensor forward(const Tensor& a, const Tensor& b) {
  const int64_t channels = require_two_descriptors(a, "a", b, "b"), n = a.size(0), m = b.size(0);
  const Tensor wide_a = wide(a), wide_b = wide(b);
  const Tensor out = empty(a, {n, m}, accumulate_type(a));
  with_accumulate_type(a, [&]<typename scalar_t>() {
    semantic_disparity_forward(data<scalar_t>(wide_a), n, data<scalar_t>(wide_b), m, channels,
                               mutable_data<scalar_t>(out), torch_threads());
  });
  return cast(out, a.scalar_type());
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& a, const Tensor& b, bool needs_a, bool needs_b) {
  const int64_t channels = require_two_descriptors(a, "a", b, "b"), n = a.size(0), m = b.size(0);
  require_tensor(grad, "grad", a, a.scalar_type(), {n, m});
  const Tensor wide_grad = wide(grad), wide_a = wide(a), wide_b = wide(b);
  const Tensor grad_a = empty(a, needs_a ? shape_of(a) : Shape{0}, accumulate_type(a));
  const Tensor grad_b = empty(b, needs_b ? shape_of(b) : Shape{0}, accumulate_type(b));
  with_accumulate_type(a, [&]<typename scalar_t>() {
    semantic_disparity_backward(data<scalar_t>(wide_grad), data<scalar_t>(wide_a), n, data<scalar_t>(wide_b), m,
                                channels, needs_a ? mutable_data<scalar_t>(grad_a) : nullptr,
                                needs_b ? mutable_data<scalar_t>(grad_b) : nullptr, torch_threads());
  });
  return {cast(grad_a, a.scalar_type()), cast(grad_b, b.scalar_type())};
}

Tensor bounds(const Tensor& descriptors, const Tensor& labels, const Tensor& key_descriptors, const Tensor& key_labels,
              int64_t count, bool positives, int64_t ignore_index, int64_t self_offset) {
  const int64_t channels = require_disparity_bounds(descriptors, labels, key_descriptors, key_labels, count);
  const Tensor a = wide(descriptors), b = wide(key_descriptors);
  const Tensor y = as_contiguous(labels), key_y = as_contiguous(key_labels);
  const Tensor out = empty(a, {a.size(0)}, accumulate_type(a));
  with_accumulate_type(a, [&]<typename scalar_t>() {
    const DisparityBounds<scalar_t> inputs{data<scalar_t>(a), data<scalar_t>(b), data<int64_t>(y), data<int64_t>(key_y),
                                           a.size(0),         b.size(0),         channels,         count,
                                           ignore_index,      self_offset,       positives};
    disparity_bounds(inputs, mutable_data<scalar_t>(out), torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("semantic_disparity", TORCH_BOX(&forward));
  m.impl("semantic_disparity_backward", TORCH_BOX(&backward));
  m.impl("disparity_bounds", TORCH_BOX(&bounds));
}

}  // namespace pglcl
