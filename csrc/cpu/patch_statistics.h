// Patch statistics on the CPU (method, section 2): the passes that the op calls, without torch.
#pragma once

#include "../shared/dtype.h"
#include "../shared/patch_grid.h"
#include "threads.h"

namespace pglcl {

// Contiguous arrays of one dtype: input (B, K, *S), entropy (B, *g), confidence and class_entropy (B, K, *g).
struct StatisticsInputs {
  PatchGrid grid;
  const void* input;
  DType dtype;
  bool probabilities;
  bool normalize;
};

struct StatisticsOutputs {
  void *entropy, *confidence, *class_entropy;
  DType dtype;
};

template <typename scalar_t>
void patch_statistics_forward(const StatisticsInputs& inputs, const StatisticsOutputs& out, const Parallel& parallel);

// The outputs of the forward pass, and the gradients of the loss with respect to them. All of grad_input is written.
template <typename scalar_t>
void patch_statistics_backward(const StatisticsInputs& inputs, const void* confidence, const void* class_entropy,
                               const void* grad_entropy, const void* grad_confidence, const void* grad_class_entropy,
                               void* grad_input, const Parallel& parallel);

}  // namespace pglcl
