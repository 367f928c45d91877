// The Gaussian contrastive loss on the CPU (method, section 6): the passes that the op calls, without torch.
#pragma once

#include "convert.h"
#include "threads.h"

namespace pglcl {

template <typename scalar_t>
struct GaussianInputs {
  const void* anchors;  // (N, depth) of `dtype`
  ScalarType dtype;
  int64_t n, depth, classes;
  const int64_t* labels;        // (N,)
  const scalar_t* means;        // (classes, depth), or (classes, classes, depth) when pairwise
  const scalar_t* covariances;  // (classes, depth, depth), or (classes, classes, depth, depth)
  const int64_t* counts;        // (classes,)
  bool pairwise;
  double temperature, covariance_scale, negative_weight;
  int64_t ignore_index;
};

// The index in `labels` of the first label that is neither a class nor ignored; -1 if there is none.
template <typename scalar_t>
int64_t find_bad_label(const GaussianInputs<scalar_t>& x);

// Writes losses (N,), 0 for anchors that do not count, and gradients (N, depth), d loss_i / d anchor_i (null: not
// computed). Returns the number of anchors that count.
template <typename scalar_t>
int64_t gaussian_contrast(const GaussianInputs<scalar_t>& x, scalar_t* losses, scalar_t* gradients,
                          const Parallel& parallel);

}  // namespace pglcl
