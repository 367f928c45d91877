// Problems of float32 and narrower embeddings whose products or logits leave the range of float32. The passes run in
// float64, and their results are rounded to float32. Which pairs count is still decided in float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "buffer.h"
#include "patch_contrast.h"

namespace pglcl {

// The logarithm of a denominator in two numbers, as the forward pass saves it.
template <typename scalar_t>
struct SavedLog {
  scalar_t max_logit, log_sum;
};

// Takes the nearest float32 as maximum, and adds its rounding error to the other number if both are finite.
inline SavedLog<float> narrowed(double max_logit, double log_sum) {
  const float top = float(max_logit);
  return {top, float(std::isfinite(top) ? log_sum + (max_logit - double(top)) : log_sum)};
}

class WideContrast {
 public:
  ContrastInputs<double> inputs{};
  Buffer<double> loss, max_logit, log_sum, positive_logit;
  Buffer<int32_t> num_positives;

  // For the backward pass, with the results of the forward pass.
  WideContrast(const ContrastInputs<float>& x, const Parallel& parallel)
      : loss(x.anchors.rows),
        max_logit(x.anchors.rows),
        log_sum(x.anchors.rows),
        positive_logit(x.anchors.rows),
        num_positives(x.anchors.rows) {
    inputs.anchors = x.anchors;
    inputs.keys = x.keys;
    inputs.depth = x.depth;
    inputs.labels = x.labels;
    inputs.key_labels = x.key_labels;
    inputs.channels = x.channels;
    inputs.float32_disparity = true;
    inputs.descriptors = widened(x.descriptors, x.anchors.rows * x.channels, descriptors_);
    inputs.key_descriptors = widened(x.key_descriptors, x.keys.rows * x.channels, key_descriptors_);
    inputs.positive_bound = x.positive_bound;
    inputs.negative_bound = x.negative_bound;
    inputs.positive_bounds = widened(x.positive_bounds, x.anchors.rows, positive_bounds_);
    inputs.negative_bounds = widened(x.negative_bounds, x.anchors.rows, negative_bounds_);
    inputs.masks = x.masks;
    inputs.temperature = x.temperature;
    inputs.negative_weight = x.negative_weight;
    inputs.ignore_index = x.ignore_index;
    inputs.self_offset = x.self_offset;
    patch_contrast_forward<double>(
        inputs, {loss.data(), max_logit.data(), log_sum.data(), positive_logit.data(), num_positives.data()}, parallel);
  }

  // Keeps the wide numbers of an anchor if the saved numbers come from this very pass. Otherwise it takes the saved
  // ones, to which keys of other processes have contributed.
  void measure_from(int64_t i, SavedLog<float> saved) {
    const SavedLog<float> own = narrowed(max_logit[i], log_sum[i]);
    if (own.max_logit == saved.max_logit && own.log_sum == saved.log_sum) return;
    const double total = double(saved.max_logit) + double(saved.log_sum);
    max_logit[i] = total;
    log_sum[i] = std::isfinite(total) ? 0 : std::nan("");
  }

 private:
  static const double* widened(const float* values, int64_t count, Buffer<double>& into) {
    if (!values) return nullptr;
    into = Buffer<double>(count + 1);  // an empty one has an address, too
    for (int64_t i = 0; i < count; ++i) into[i] = values[i];
    return into.data();
  }

  Buffer<double> descriptors_, key_descriptors_, positive_bounds_, negative_bounds_;
};

inline void forward_in_float64(const ContrastInputs<float>& x, const AnchorSums<float>& out, const Parallel& parallel) {
  const WideContrast wide(x, parallel);
  for (int64_t i = 0; i < x.anchors.rows; ++i) {
    const SavedLog<float> saved = narrowed(wide.max_logit[i], wide.log_sum[i]);
    out.loss[i] = float(wide.loss[i]);
    out.max_logit[i] = saved.max_logit;
    out.log_sum[i] = saved.log_sum;
    out.positive_logit[i] = float(wide.positive_logit[i]);
    out.num_positives[i] = wide.num_positives[i];
  }
}

struct SavedAnchors {
  const float *max_logit, *log_sum;
  const int32_t* num_positives;
};

inline void backward_in_float64(const ContrastInputs<float>& x, const float* grad_rows, const SavedAnchors& saved,
                                void* grad_anchors, void* grad_keys, const Parallel& parallel) {
  WideContrast wide(x, parallel);
  Buffer<double> rows(x.anchors.rows);
  for (int64_t i = 0; i < x.anchors.rows; ++i) {
    rows[i] = grad_rows[i];
    wide.measure_from(i, {saved.max_logit[i], saved.log_sum[i]});
  }
  patch_contrast_backward<double>(wide.inputs, rows.data(), wide.max_logit.data(), wide.log_sum.data(),
                                  saved.num_positives, grad_anchors, grad_keys, parallel);
}

}  // namespace pglcl
