// CPU implementation of the ops semantic_disparity and disparity_bounds: check, allocate, call the kernel.
#include "semantic_disparity_kernel.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "torch_threads.h"

namespace pglcl {
namespace {

at::ScalarType accumulate_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor wide(const at::Tensor& t) { return t.to(accumulate_type(t)).contiguous(); }

at::Tensor forward(const at::Tensor& a, const at::Tensor& b) {
  const int64_t channels = check_disparity(a, b), n = a.size(0), m = b.size(0);
  const at::Tensor wide_a = wide(a), wide_b = wide(b);
  at::Tensor out = at::empty({n, m}, wide_a.options());
  const auto run = [&]<typename scalar_t>() {
    semantic_disparity_forward(wide_a.const_data_ptr<scalar_t>(), n, wide_b.const_data_ptr<scalar_t>(), m, channels,
                               out.mutable_data_ptr<scalar_t>(), torch_threads());
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  return out.to(a.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& a, const at::Tensor& b,
                                            bool needs_a, bool needs_b) {
  const int64_t channels = check_disparity(a, b), n = a.size(0), m = b.size(0);
  const at::Tensor wide_grad = wide(grad), wide_a = wide(a), wide_b = wide(b);
  at::Tensor grad_a = at::empty(needs_a ? a.sizes() : at::IntArrayRef{0}, wide_a.options());
  at::Tensor grad_b = at::empty(needs_b ? b.sizes() : at::IntArrayRef{0}, wide_b.options());
  const auto run = [&]<typename scalar_t>() {
    semantic_disparity_backward(wide_grad.const_data_ptr<scalar_t>(), wide_a.const_data_ptr<scalar_t>(), n,
                                wide_b.const_data_ptr<scalar_t>(), m, channels,
                                needs_a ? grad_a.mutable_data_ptr<scalar_t>() : nullptr,
                                needs_b ? grad_b.mutable_data_ptr<scalar_t>() : nullptr, torch_threads());
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  return {grad_a.to(a.scalar_type()), grad_b.to(b.scalar_type())};
}

at::Tensor bounds(const at::Tensor& descriptors, const at::Tensor& labels, const at::Tensor& key_descriptors,
                  const at::Tensor& key_labels, int64_t count, bool positives, int64_t ignore_index,
                  int64_t self_offset) {
  const int64_t channels = check_disparity_bounds(descriptors, labels, key_descriptors, key_labels, count, positives);
  const at::Tensor a = wide(descriptors), b = wide(key_descriptors);
  const at::Tensor y = labels.contiguous(), key_y = key_labels.contiguous();
  at::Tensor out = at::empty({a.size(0)}, a.options());
  const auto run = [&]<typename scalar_t>() {
    const DisparityBounds<scalar_t> inputs{a.const_data_ptr<scalar_t>(),
                                           b.const_data_ptr<scalar_t>(),
                                           y.const_data_ptr<int64_t>(),
                                           key_y.const_data_ptr<int64_t>(),
                                           a.size(0),
                                           b.size(0),
                                           channels,
                                           count,
                                           ignore_index,
                                           self_offset,
                                           positives};
    disparity_bounds(inputs, out.mutable_data_ptr<scalar_t>(), torch_threads());
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, CPU, m) {
  m.impl("semantic_disparity", forward);
  m.impl("semantic_disparity_backward", backward);
  m.impl("disparity_bounds", bounds);
}

}  // namespace pglcl
