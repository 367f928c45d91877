// The arguments and outputs of the ops as C++ sees them, shared by the implementations of all devices. pglcl.cpp has
// the schemas. The long lists of arguments stand here alone, and the schemas take them from here.
#pragma once

#include <tuple>

#include "stable.h"

namespace pglcl {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

using OptionalTensor = std::optional<Tensor>;

// The arguments of patch_contrast and its backward op, and of gaussian_contrast, after the anchors, in the order of the
// schema. _(type, name) is one of the macros below. They turn a list into a schema, parameters, the fields of a struct,
// or their values.
#define PGLCL_CONTRAST_LIST(_)       \
  _(Tensor, labels)                  \
  _(OptionalTensor, descriptors)     \
  _(OptionalTensor, keys)            \
  _(OptionalTensor, key_labels)      \
  _(OptionalTensor, key_descriptors) \
  _(OptionalTensor, positive_bounds) \
  _(OptionalTensor, negative_bounds) \
  _(OptionalTensor, positive_mask)   \
  _(OptionalTensor, negative_mask)   \
  _(double, temperature)             \
  _(double, positive_bound)          \
  _(double, negative_bound)          \
  _(double, negative_weight)         \
  _(int64_t, ignore_index)           \
  _(int64_t, self_offset)            \
  _(int64_t, reduction)              \
  _(bool, allow_tf32) /* float32 products may round their factors to TF32, PyTorch's switch; only GPUs can */

#define PGLCL_GAUSSIAN_LIST(_) \
  _(Tensor, labels)            \
  _(Tensor, means)             \
  _(Tensor, covariances)       \
  _(Tensor, counts)            \
  _(double, temperature)       \
  _(double, covariance_scale)  \
  _(double, negative_weight)   \
  _(int64_t, ignore_index)     \
  _(int64_t, reduction)        \
  _(bool, needs_gradients)

#define PGLCL_SCHEMA_Tensor "Tensor"
#define PGLCL_SCHEMA_OptionalTensor "Tensor?"
#define PGLCL_SCHEMA_double "float"
#define PGLCL_SCHEMA_int64_t "int"
#define PGLCL_SCHEMA_bool "bool"

#define PGLCL_SCHEMA(type, name) ", " PGLCL_SCHEMA_##type " " #name
#define PGLCL_PARAMETER(type, name) , const type& name
#define PGLCL_NAME(type, name) , name
#define PGLCL_FIELD(type, name) const type& name;

#define PGLCL_CONTRAST_SCHEMA "Tensor anchors" PGLCL_CONTRAST_LIST(PGLCL_SCHEMA)
#define PGLCL_CONTRAST_PARAMETERS const Tensor& anchors PGLCL_CONTRAST_LIST(PGLCL_PARAMETER)
#define PGLCL_CONTRAST_ARGUMENTS {anchors PGLCL_CONTRAST_LIST(PGLCL_NAME)}

#define PGLCL_GAUSSIAN_SCHEMA "Tensor anchors" PGLCL_GAUSSIAN_LIST(PGLCL_SCHEMA)
#define PGLCL_GAUSSIAN_PARAMETERS const Tensor& anchors PGLCL_GAUSSIAN_LIST(PGLCL_PARAMETER)
#define PGLCL_GAUSSIAN_ARGUMENTS {anchors PGLCL_GAUSSIAN_LIST(PGLCL_NAME)}

struct PatchContrastArgs {
  const Tensor& anchors;
  PGLCL_CONTRAST_LIST(PGLCL_FIELD)
};

struct GaussianContrastArgs {
  const Tensor& anchors;
  PGLCL_GAUSSIAN_LIST(PGLCL_FIELD)
};

// loss, max_logit, log_sum, positive_logit, num_positives and num_valid.
using ContrastOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace pglcl
