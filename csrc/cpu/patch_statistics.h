// Patch statistics on the CPU (method, section 2): the passes that the op calls, without torch.
#pragma once

#include "../shared/dtype.h"
#include "../shared/patch_grid.h"
#include "threads.h"

namespace pglcl {

// Contiguous arrays: input (B, K, *S) of `dtype`, and in the type that sums are kept in entropy (B, *g), confidence and
// class_entropy (B, K, *g): a backward pass divides by small differences of theirs.
struct StatisticsInputs {
  PatchGrid grid;
  const void* input;
  DType dtype;
  bool probabilities;
  bool normalize;
};

// What the forward pass writes, and of the gradients of the loss with respect to it what the backward pass reads.
template <typename scalar_t>
struct StatisticsOutputs {
  scalar_t *entropy, *confidence, *class_entropy;
};

template <typename scalar_t>
void patch_statistics_forward(const StatisticsInputs& inputs, const StatisticsOutputs<scalar_t>& out,
                              const Parallel& parallel);

// grad_input, of the inputs' dtype, is written whole.
template <typename scalar_t>
void patch_statistics_backward(const StatisticsInputs& inputs, const scalar_t* confidence,
                               const scalar_t* class_entropy, const StatisticsOutputs<const scalar_t>& grads,
                               void* grad_input, const Parallel& parallel);

}  // namespace pglcl
