// Patch statistics on the CPU (method, section 2): the passes that the op calls, without torch.
#pragma once

#include "../shared/patch_grid.h"
#include "convert.h"
#include "threads.h"

namespace pglcl {

// Contiguous arrays: input (B, K, *S) of `dtype`; entropy (B, *g), confidence and class_entropy (B, K, *g) in the type
// of the sums, since a backward pass divides by small differences of them.
struct StatisticsInputs {
  PatchGrid grid;
  const void* input;
  ScalarType dtype;
  bool probabilities;
  bool normalize;
};

// The outputs of the forward pass, or the gradients of the loss with respect to them, for the backward pass.
template <typename scalar_t>
struct StatisticsOutputs {
  scalar_t *entropy, *confidence, *class_entropy;
};

template <typename scalar_t>
void patch_statistics_forward(const StatisticsInputs& inputs, const StatisticsOutputs<scalar_t>& out,
                              const Parallel& parallel);

// grad_input has the dtype of the input. All of it is written.
template <typename scalar_t>
void patch_statistics_backward(const StatisticsInputs& inputs, const scalar_t* confidence,
                               const scalar_t* class_entropy, const StatisticsOutputs<const scalar_t>& grads,
                               void* grad_input, const Parallel& parallel);

}  // namespace pglcl
