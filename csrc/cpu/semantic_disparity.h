// Semantic disparity, and bounds on it, on the CPU (method, sections 3 and 4): the passes that the ops call, without
// torch.
#pragma once

#include <cstdint>

#include "threads.h"

namespace pglcl {

// out (N, M) = mean over channels of |a (N, C) - b (M, C)|.
template <typename scalar_t>
void semantic_disparity_forward(const scalar_t* a, int64_t n, const scalar_t* b, int64_t m, int64_t channels,
                                scalar_t* out, const Parallel& parallel);

// Gradients to a and b (null: not computed) from grad (N, M).
template <typename scalar_t>
void semantic_disparity_backward(const scalar_t* grad, const scalar_t* a, int64_t n, const scalar_t* b, int64_t m,
                                 int64_t channels, scalar_t* grad_a, scalar_t* grad_b, const Parallel& parallel);

// For each anchor, the count-th smallest disparity among the keys of its label (positives), or the count-th largest
// among those of other labels (negatives). If there are fewer keys, the bound keeps all of them.
template <typename scalar_t>
struct DisparityBounds {
  const scalar_t* descriptors;      // (N, channels)
  const scalar_t* key_descriptors;  // (M, channels)
  const int64_t* labels;
  const int64_t* key_labels;
  int64_t anchors, keys, channels, count;
  int64_t ignore_index;
  int64_t self_offset;  // key i + self_offset is anchor i itself and does not count; negative: none is
  bool positives;
};

template <typename scalar_t>
void disparity_bounds(const DisparityBounds<scalar_t>& inputs, scalar_t* bounds, const Parallel& parallel);

}  // namespace pglcl
