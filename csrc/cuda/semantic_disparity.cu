// CUDA implementation of the ops semantic_disparity and disparity_bounds: check, allocate, launch.
#include "kernels/semantic_disparity.cuh"

#include "../checks.h"
#include "launch.h"

namespace pglcl {
namespace {

Tensor wide(const Tensor& t) { return as_contiguous(t, accumulate_type(t)); }

Tensor forward(const Tensor& a, const Tensor& b) {
  const int64_t channels = require_two_descriptors(a, "a", b, "b"), n = a.size(0), m = b.size(0);
  const DeviceGuard guard(a);
  const Tensor wide_a = wide(a), wide_b = wide(b), out = empty(a, {n, m}, accumulate_type(a));
  with_accumulate_type(a, [&]<typename scalar_t>() {
    cuda::run_disparity_forward(input_of<scalar_t>(wide_a), input_of<scalar_t>(wide_b), output_of<scalar_t>(out), n, m,
                                channels, current_stream());
  });
  PGLCL_CHECK_LAUNCH();
  return cast(out, a.scalar_type());
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& a, const Tensor& b, bool needs_a, bool needs_b) {
  const int64_t channels = require_two_descriptors(a, "a", b, "b"), n = a.size(0), m = b.size(0);
  require_tensor(grad, "grad", a, a.scalar_type(), {n, m});
  const DeviceGuard guard(a);
  const Tensor g = cast(grad, accumulate_type(a)), wide_a = wide(a), wide_b = wide(b);
  const Tensor grad_a = empty(a, needs_a ? shape_of(a) : Shape{0}, accumulate_type(a));
  const Tensor grad_b = empty(b, needs_b ? shape_of(b) : Shape{0}, accumulate_type(b));
  with_accumulate_type(a, [&]<typename T>() {
    const auto stream = current_stream();
    if (needs_a)
      cuda::run_disparity_backward(input_of<T>(g), input_of<T>(wide_a), input_of<T>(wide_b), output_of<T>(grad_a), n, m,
                                   channels, g.stride(0), g.stride(1), stream);
    if (needs_b)
      cuda::run_disparity_backward(input_of<T>(g), input_of<T>(wide_b), input_of<T>(wide_a), output_of<T>(grad_b), m, n,
                                   channels, g.stride(1), g.stride(0), stream);
  });
  PGLCL_CHECK_LAUNCH();
  return {cast(grad_a, a.scalar_type()), cast(grad_b, b.scalar_type())};
}

// The arrays of SortedKeys. Ignored keys come after all others. The host does not wait for the device.
template <typename T>
struct KeyOrders {
  Tensor value, label, place, member_of, total;

  KeyOrders(const Tensor& descriptors, const Tensor& labels, int64_t ignore_index) {
    const int64_t m = labels.size(0);
    const Tensor values = empty(descriptors, {m}, descriptors.scalar_type()), names = empty(labels, {m});
    const Tensor counts = empty(labels, {m});
    cuda::run_bounds_prepare(input_of<T>(descriptors), input_of<int64_t>(labels), m, ignore_index, output_of<T>(values),
                             output_of<int64_t>(names), output_of<int64_t>(counts), current_stream());
    Tensor order;
    std::tie(value, order) = stable_sort(values);
    std::tie(label, place) = stable_sort(rows_at(names, order));
    total = torch::stable::sum(counts);
    member_of = empty(labels, {m});
    cuda::run_bounds_members(input_of<int64_t>(order), input_of<int64_t>(place), input_of<int64_t>(counts), m,
                             output_of<int64_t>(member_of), current_stream());
  }

  cuda::SortedInputs<T> inputs() const {
    return {input_of<T>(value), input_of<int64_t>(label), input_of<int64_t>(place), input_of<int64_t>(member_of),
            input_of<int64_t>(total)};
  }
};

Tensor bounds(const Tensor& descriptors, const Tensor& labels, const Tensor& key_descriptors, const Tensor& key_labels,
              int64_t count, bool positives, int64_t ignore_index, int64_t self_offset) {
  const int64_t channels = require_disparity_bounds(descriptors, labels, key_descriptors, key_labels, count);
  const DeviceGuard guard(descriptors);
  const Tensor a = wide(descriptors), b = wide(key_descriptors);
  const Tensor y = as_contiguous(labels), key_y = as_contiguous(key_labels);
  const Tensor out = empty(a, {a.size(0)}, a.scalar_type());
  with_accumulate_type(a, [&]<typename T>() {
    const cuda::BoundsInputs<T> inputs{input_of<T>(a),
                                       input_of<T>(b),
                                       input_of<int64_t>(y),
                                       input_of<int64_t>(key_y),
                                       a.size(0),
                                       b.size(0),
                                       channels,
                                       count,
                                       ignore_index,
                                       self_offset,
                                       positives};
    if (channels > 1) {
      cuda::run_bounds_select(inputs, output_of<T>(out), current_stream());
    } else {
      const KeyOrders<T> sorted(b, key_y, ignore_index);
      cuda::run_bounds_sorted(inputs, sorted.inputs(), output_of<T>(out), current_stream());
    }
  });
  PGLCL_CHECK_LAUNCH();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pglcl_ext, PGLCL_CUDA_KEY, m) {
  m.impl("semantic_disparity", TORCH_BOX(&forward));
  m.impl("semantic_disparity_backward", TORCH_BOX(&backward));
  m.impl("disparity_bounds", TORCH_BOX(&bounds));
}

}  // namespace pglcl
