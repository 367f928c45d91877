// The data of one strip of image rows of the patch statistics (method, section 2), as in contrast_tile.h.
#pragma once

#include <stdint.h>

namespace pglcl {

constexpr int kMaxLanes = 16;
constexpr int kStatisticsRows = 4;  // rows that are computed at once

// Elements of scratch memory: vectors for the classes of the rows that are computed at once, and of a ragged end.
constexpr int64_t statistics_scratch(int64_t classes) { return (kStatisticsRows + 1) * classes * kMaxLanes; }

// The type of inputs and gradients: the computing type, or 16 bits if that is float.
enum class Element : int8_t { kAsComputed, kBFloat16, kFloat16 };

// Sums the statistics of consecutive image rows, column by column, into rows as wide as the image.
template <typename scalar_t>
struct StatisticsStrip {
  const void* input;  // element of class k and row r at k * class_stride + r * row_stride
  Element element;
  int64_t class_stride;
  int64_t row_stride;
  int64_t rows;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;  // statistics_scratch(classes)
  scalar_t* entropy;  // (width,): += h(x)
  scalar_t* mass;     // (classes, width): += p_k(x)
  scalar_t* product;  // (classes, width): += p_k(x) h(x)
};

// dL/d(input) of consecutive image rows that lie in the same patches. The coefficients, summed over these patches, are
//   alpha = dL/dH_j / |j|,  gamma_k = dL/dH_jk / sum p_k,  beta_k = dL/dc_jk / |j| - gamma_k H_jk.
template <typename scalar_t>
struct StatisticsGradientStrip {
  const void* input;
  Element element;
  int64_t class_stride;
  int64_t row_stride;
  int64_t rows;
  int64_t width;
  int64_t classes;
  bool probabilities;
  scalar_t* scratch;      // statistics_scratch(classes)
  const scalar_t* alpha;  // (width,)
  const scalar_t* beta;   // (classes, width)
  const scalar_t* gamma;  // (classes, width)
  void* grad_input;       // of the elements and strides of `input`
};

}  // namespace pglcl
