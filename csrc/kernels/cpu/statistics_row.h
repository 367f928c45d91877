// What one image row of the patch statistics works on (METHOD section 2): plain data, as in contrast_tile.h.
#pragma once

#include <stdint.h>

namespace pglcl {

// Adds the statistics of one image row, pixel by pixel, to accumulators as wide as the row.
template <typename scalar_t>
struct StatisticsRow {
  const scalar_t* input;  // class k at input + k * class_stride
  int64_t class_stride;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;         // (classes + 1, kMaxLanes)
  scalar_t* const* entropy;  // `targets` accumulators of `width`: h(x)
  scalar_t* const* mass;     // `targets` accumulators of (classes, width): p_k(x)
  scalar_t* const* product;  // `targets` accumulators of (classes, width): p_k(x) h(x)
  int targets;               // patch rows that hold this image row
};

// dL/d(input) of one image row. The coefficients, summed over the patches that hold a pixel, are
//   alpha = dL/dH_j / |j|,  gamma_k = dL/dH_jk / sum p_k,  beta_k = dL/dc_jk / |j| - gamma_k H_jk.
template <typename scalar_t>
struct StatisticsGradientRow {
  const scalar_t* input;
  int64_t class_stride;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;      // (2 * classes, kMaxLanes)
  const scalar_t* alpha;  // (width,)
  const scalar_t* beta;   // (classes, width)
  const scalar_t* gamma;  // (classes, width)
  scalar_t* grad_input;   // class k at grad_input + k * grad_class_stride
  int64_t grad_class_stride;
};

constexpr int kMaxLanes = 16;

}  // namespace pglcl
