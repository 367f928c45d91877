// The arguments and outputs of the ops as C++ sees them, shared by the implementations of all devices. The schemas are
// in pglcl.cpp.
#pragma once

#include <tuple>

#include "stable.h"

namespace pglcl {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using OptionalTensor = std::optional<Tensor>;

// clang-format off
#define PGLCL_CONTRAST_PARAMETERS                                                                            \
  const Tensor &anchors, const Tensor &labels, const OptionalTensor &descriptors, const OptionalTensor &keys, \
  const OptionalTensor &key_labels, const OptionalTensor &key_descriptors,                                   \
  const OptionalTensor &positive_bounds, const OptionalTensor &negative_bounds,                              \
  const OptionalTensor &positive_mask, const OptionalTensor &negative_mask, double temperature,              \
  double positive_bound, double negative_bound, double negative_weight, int64_t ignore_index,                \
  int64_t self_offset, int64_t reduction, bool allow_tf32

#define PGLCL_CONTRAST_ARGUMENTS                                                                             \
  {anchors, labels, descriptors, keys, key_labels, key_descriptors, positive_bounds, negative_bounds,        \
   positive_mask, negative_mask, temperature, positive_bound, negative_bound, negative_weight,               \
   ignore_index, self_offset, reduction, allow_tf32}

#define PGLCL_GAUSSIAN_PARAMETERS                                                                            \
  const Tensor &anchors, const Tensor &labels, const Tensor &means, const Tensor &covariances,               \
  const Tensor &counts, double temperature, double covariance_scale, double negative_weight,                 \
  int64_t ignore_index, int64_t reduction, bool needs_gradients

#define PGLCL_GAUSSIAN_ARGUMENTS                                                                             \
  {anchors, labels, means, covariances, counts, temperature, covariance_scale, negative_weight,              \
   ignore_index, reduction, needs_gradients}
// clang-format on

struct PatchContrastArgs {
  const Tensor &anchors, &labels;
  const OptionalTensor &descriptors, &keys, &key_labels, &key_descriptors, &positive_bounds, &negative_bounds,
      &positive_mask, &negative_mask;
  double temperature, positive_bound, negative_bound, negative_weight;
  int64_t ignore_index, self_offset, reduction;
  bool allow_tf32;  // whether float32 products may round their factors to TF32; only GPUs can
};

// loss, max_logit, log_sum, positive_logit, num_positives and num_valid.
using ContrastOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct GaussianContrastArgs {
  const Tensor &anchors, &labels, &means, &covariances, &counts;
  double temperature, covariance_scale, negative_weight;
  int64_t ignore_index, reduction;
  bool needs_gradients;
};

}  // namespace pglcl
