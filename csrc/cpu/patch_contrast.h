// Fused contrastive loss on the CPU (method, sections 4 and 5): the passes that the op calls, without torch.
#pragma once

#include <cstdint>

#include "convert.h"
#include "isa/contrast_tile.h"
#include "threads.h"

namespace pglcl {

// Row-major with contiguous columns.
struct Matrix {
  const void* data;
  ScalarType dtype;
  int64_t rows;
};

// scalar_t is the type of all sums: double for float64 inputs, float otherwise.
template <typename scalar_t>
struct ContrastInputs {
  Matrix anchors;
  Matrix keys;  // data null: the anchors are the keys, and no patch is its own pair
  int64_t depth;
  const int64_t* labels;
  const int64_t* key_labels;
  const scalar_t* descriptors;  // (N, channels), null without
  const scalar_t* key_descriptors;
  int64_t channels;
  bool float32_disparity;  // of double: disparities are computed as they are for float32
  scalar_t positive_bound, negative_bound;
  const scalar_t* positive_bounds;  // (N,), null: the scalar applies
  const scalar_t* negative_bounds;
  ContrastMasks masks;  // masks.positive null: labels and bounds decide
  double temperature;
  double negative_weight;
  int64_t ignore_index;
  int64_t self_offset;  // with keys: anchor i and key i + self_offset are the same patch; negative: none is

  bool symmetric() const { return keys.data == nullptr; }
};

// The results of the forward pass for each anchor. The logarithm of the denominator is max_logit + log_sum. It is kept
// in two numbers because the rounded total has an error of 6e-8 of the logits. Both are minus infinity without a pair.
template <typename scalar_t>
struct AnchorSums {
  scalar_t* loss;            // 0 without a positive
  scalar_t* max_logit;       // the largest logit, or a number close above it
  scalar_t* log_sum;         // log of the sum of e^(logit - max_logit)
  scalar_t* positive_logit;  // mean logit of the positives, 0 without
  int32_t* num_positives;
};

template <typename scalar_t>
void patch_contrast_forward(const ContrastInputs<scalar_t>& inputs, const AnchorSums<scalar_t>& out,
                            const Parallel& parallel);

// grad_rows (N,) is dL/d(loss of each anchor). The gradients have the dtype of the inputs, and the caller fills them
// with zeros; a null one is not computed. If the anchors are the keys, grad_anchors holds both parts, and grad_keys is
// null.
template <typename scalar_t>
void patch_contrast_backward(const ContrastInputs<scalar_t>& inputs, const scalar_t* grad_rows,
                             const scalar_t* max_logit, const scalar_t* log_sum, const int32_t* num_positives,
                             void* grad_anchors, void* grad_keys, const Parallel& parallel);

}  // namespace pglcl
