// The Gaussian contrastive loss on the CPU (method, section 6): what the op schedules, without torch.
#pragma once

#include "../shared/dtype.h"
#include "threads.h"

namespace pglcl {

template <typename scalar_t>
struct GaussianInputs {
  const void* anchors;  // (N, depth) of `dtype`
  DType dtype;
  int64_t n, depth, classes;
  const int64_t* labels;        // (N,)
  const scalar_t* means;        // (classes, depth), or (classes, classes, depth) when pairwise
  const scalar_t* covariances;  // (classes, depth, depth), or (classes, classes, depth, depth)
  const int64_t* counts;        // (classes,)
  bool pairwise;
  double temperature, covariance_scale, negative_weight;
  int64_t ignore_index;
};

// The first label that is neither a class nor ignored, or -1: the place in `labels`.
template <typename scalar_t>
int64_t find_bad_label(const GaussianInputs<scalar_t>& x);

// losses (N,), 0 where an anchor does not count; gradients (N, depth), d loss_i / d anchor_i, null: not wanted. Returns
// the number of anchors that count.
template <typename scalar_t>
int64_t gaussian_contrast(const GaussianInputs<scalar_t>& x, scalar_t* losses, scalar_t* gradients,
                          const Parallel& parallel);

}  // namespace pglcl
