// CUDA implementation of the ops semantic_disparity and disparity_bounds: check, allocate, launch.
#include "kernels/semantic_disparity.cuh"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <limits>

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

at::ScalarType accumulate_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor wide(const at::Tensor& t) { return t.to(accumulate_type(t)).contiguous(); }

at::Tensor forward(const at::Tensor& a, const at::Tensor& b) {
  const int64_t channels = check_disparity(a, b), n = a.size(0), m = b.size(0);
  const DeviceGuard guard(a);
  const at::Tensor wide_a = wide(a), wide_b = wide(b);
  at::Tensor out = at::empty({n, m}, wide_a.options());
  const auto run = [&]<typename T>() {
    cuda::run_disparity_forward<T>(input_of<T>(wide_a), input_of<T>(wide_b), output_of<T>(out), n, m, channels,
                                   current_stream());
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  PGLCL_CHECK_LAUNCH();
  return out.to(a.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& a, const at::Tensor& b,
                                            bool needs_a, bool needs_b) {
  const int64_t channels = check_disparity(a, b), n = a.size(0), m = b.size(0);
  const DeviceGuard guard(a);
  const at::Tensor g = grad.to(accumulate_type(grad)), wide_a = wide(a), wide_b = wide(b);
  at::Tensor grad_a = needs_a ? at::empty(a.sizes(), wide_a.options()) : at::empty({0}, wide_a.options());
  at::Tensor grad_b = needs_b ? at::empty(b.sizes(), wide_b.options()) : at::empty({0}, wide_b.options());
  const auto run = [&]<typename T>() {
    const auto stream = current_stream();
    if (needs_a)
      cuda::run_disparity_backward<T>(input_of<T>(g), input_of<T>(wide_a), input_of<T>(wide_b), output_of<T>(grad_a), n,
                                      m, channels, g.stride(0), g.stride(1), stream);
    if (needs_b)
      cuda::run_disparity_backward<T>(input_of<T>(g), input_of<T>(wide_b), input_of<T>(wide_a), output_of<T>(grad_b), m,
                                      n, channels, g.stride(1), g.stride(0), stream);
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  PGLCL_CHECK_LAUNCH();
  return {grad_a.to(a.scalar_type()), grad_b.to(b.scalar_type())};
}

at::Tensor bounds(const at::Tensor& descriptors, const at::Tensor& labels, const at::Tensor& key_descriptors,
                  const at::Tensor& key_labels, int64_t count, bool positives, int64_t ignore_index,
                  int64_t self_offset) {
  const int64_t channels = check_disparity_bounds(descriptors, labels, key_descriptors, key_labels, count, positives);
  const DeviceGuard guard(descriptors);
  const at::Tensor a = wide(descriptors), b = wide(key_descriptors);
  const at::Tensor y = labels.contiguous(), key_y = key_labels.contiguous();
  const int64_t n = a.size(0), m = b.size(0);
  at::Tensor out = at::empty({n}, a.options());

  // One channel: the orders of SortedKeys, with ignored keys behind all others. `total` stays on the device.
  at::Tensor value, label, place, member_of, total;
  if (channels == 1) {
    const at::Tensor ignored = key_y.eq(ignore_index);
    const auto by_value =
        b.reshape({m}).masked_fill(ignored, std::numeric_limits<double>::infinity()).sort(/*stable=*/true, 0, false);
    value = std::get<0>(by_value);
    const at::Tensor order = std::get<1>(by_value);
    const at::Tensor labels_by_value =
        key_y.masked_fill(ignored, std::numeric_limits<int64_t>::max()).index_select(0, order);
    const auto by_label = labels_by_value.sort(/*stable=*/true, 0, false);
    label = std::get<0>(by_label);
    place = std::get<1>(by_label);
    const at::Tensor members = at::arange(m, place.options());
    member_of = at::full({m}, -1, place.options()).scatter(0, order.index_select(0, place), members);
    member_of = member_of.masked_fill(ignored, -1);
    total = ignored.logical_not().sum();
  }
  const auto run = [&]<typename T>() {
    const cuda::BoundsInputs<T> inputs{input_of<T>(a),
                                       input_of<T>(b),
                                       input_of<int64_t>(y),
                                       input_of<int64_t>(key_y),
                                       n,
                                       m,
                                       channels,
                                       count,
                                       ignore_index,
                                       self_offset,
                                       positives};
    const auto stream = current_stream();
    if (channels == 1)
      cuda::run_bounds_sorted<T>(inputs,
                                 {input_of<T>(value), input_of<int64_t>(label), input_of<int64_t>(place),
                                  input_of<int64_t>(member_of), input_of<int64_t>(total)},
                                 output_of<T>(out), stream);
    else
      cuda::run_bounds_select<T>(inputs, output_of<T>(out), stream);
  };
  a.scalar_type() == at::kDouble ? run.operator()<double>() : run.operator()<float>();
  PGLCL_CHECK_LAUNCH();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("semantic_disparity", forward);
  m.impl("semantic_disparity_backward", backward);
  m.impl("disparity_bounds", bounds);
}

}  // namespace pglcl
