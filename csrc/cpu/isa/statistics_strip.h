// What one strip of image rows of the patch statistics works on (method, section 2): plain data, as in contrast_tile.h.
#pragma once

#include <stdint.h>

namespace pglcl {

// Sums the statistics of consecutive image rows, column by column, into rows as wide as the image.
template <typename scalar_t>
struct StatisticsStrip {
  const scalar_t* input;  // class k of row r at input + k * class_stride + r * row_stride
  int64_t class_stride;
  int64_t row_stride;
  int64_t rows;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;  // (2 * classes, kMaxLanes)
  scalar_t* entropy;  // (width,): += h(x)
  scalar_t* mass;     // (classes, width): += p_k(x)
  scalar_t* product;  // (classes, width): += p_k(x) h(x)
};

// dL/d(input) of consecutive image rows that lie in the same patches. The coefficients, summed over these patches, are
//   alpha = dL/dH_j / |j|,  gamma_k = dL/dH_jk / sum p_k,  beta_k = dL/dc_jk / |j| - gamma_k H_jk.
template <typename scalar_t>
struct StatisticsGradientStrip {
  const scalar_t* input;
  int64_t class_stride;
  int64_t row_stride;
  int64_t rows;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;      // (2 * classes, kMaxLanes)
  const scalar_t* alpha;  // (width,)
  const scalar_t* beta;   // (classes, width)
  const scalar_t* gamma;  // (classes, width)
  scalar_t* grad_input;   // class k of row r at grad_input + k * grad_class_stride + r * grad_row_stride
  int64_t grad_class_stride;
  int64_t grad_row_stride;
};

constexpr int kMaxLanes = 16;

}  // namespace pglcl
