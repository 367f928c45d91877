// The arguments of the ops as C++ sees them, shared by the devices' implementations. The schemas are in pglcl.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace pglcl {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// clang-format off
#define PGLCL_CONTRAST_PARAMETERS                                                                       \
  const at::Tensor &anchors, const at::Tensor &labels, const std::optional<at::Tensor>&descriptors,     \
  const std::optional<at::Tensor>&keys, const std::optional<at::Tensor>&key_labels,                     \
  const std::optional<at::Tensor>&key_descriptors, const std::optional<at::Tensor>&positive_bounds,     \
  const std::optional<at::Tensor>&negative_bounds, const std::optional<at::Tensor>&positive_mask,       \
  const std::optional<at::Tensor>&negative_mask, double temperature, double positive_bound,             \
  double negative_bound, double negative_weight, int64_t ignore_index, int64_t self_offset, int64_t reduction

#define PGLCL_CONTRAST_ARGUMENTS                                                                        \
  {anchors, labels, descriptors, keys, key_labels, key_descriptors, positive_bounds, negative_bounds,   \
   positive_mask, negative_mask, temperature, positive_bound, negative_bound, negative_weight,          \
   ignore_index, self_offset, reduction}

#define PGLCL_GAUSSIAN_PARAMETERS                                                                       \
  const at::Tensor &anchors, const at::Tensor &labels, const at::Tensor &means,                         \
  const at::Tensor &covariances, const at::Tensor &counts, double temperature, double covariance_scale, \
  double negative_weight, int64_t ignore_index, int64_t reduction, bool needs_gradients

#define PGLCL_GAUSSIAN_ARGUMENTS                                                                        \
  {anchors, labels, means, covariances, counts, temperature, covariance_scale, negative_weight,         \
   ignore_index, reduction, needs_gradients}
// clang-format on

struct PatchContrastArgs {
  at::Tensor anchors, labels;
  std::optional<at::Tensor> descriptors, keys, key_labels, key_descriptors, positive_bounds, negative_bounds,
      positive_mask, negative_mask;
  double temperature, positive_bound, negative_bound, negative_weight;
  int64_t ignore_index, self_offset, reduction;

  // The type that sums are kept in.
  at::ScalarType accumulate_type() const { return anchors.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
};

struct GaussianContrastArgs {
  const at::Tensor &anchors, &labels, &means, &covariances, &counts;
  double temperature, covariance_scale, negative_weight;
  int64_t ignore_index, reduction;
  bool needs_gradients;

  at::ScalarType accumulate_type() const { return anchors.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
};

}  // namespace pglcl
