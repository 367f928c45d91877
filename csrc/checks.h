// What is asked of the tensors of each op, once, for every device. A call in eager mode meets these checks first. Where
// they refuse, pglcl_ext/_checks.py says why, for users. So these have to refuse every tensor that those refuse.
//
// Nothing here reads a tensor's elements: that would synchronise a GPU.
#pragma once

#include <algorithm>

#include "ops.h"
#include "shared/patch_grid.h"

namespace pglcl {

constexpr int64_t kMostRows = int64_t(1) << 31;  // of anchors or keys: fewer than this many

// (rows,) or (rows, C), C at least 1; returns C.
inline int64_t require_descriptors(const Tensor& t, const char* name, int64_t rows, const Tensor& like) {
  require_floating(t, name, like);
  require((t.dim() == 1 || t.dim() == 2) && t.size(0) == rows, name);
  require(t.dim() == 1 || t.size(1) > 0, name);
  return t.dim() == 1 ? 1 : t.size(1);
}

// Descriptors (N,) or (N, C) and (M,) or (M, C) of one dtype; returns C.
inline int64_t require_two_descriptors(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  const int64_t channels = require_descriptors(a, a_name, a.dim() ? a.size(0) : 0, a);
  require(require_descriptors(b, b_name, b.dim() ? b.size(0) : 0, a) == channels, b_name);
  require(a.scalar_type() == b.scalar_type(), b_name);
  return channels;
}

// The arguments of disparity_bounds; returns C.
inline int64_t require_disparity_bounds(const Tensor& descriptors, const Tensor& labels, const Tensor& key_descriptors,
                                        const Tensor& key_labels, int64_t count) {
  const int64_t channels = require_two_descriptors(descriptors, "descriptors", key_descriptors, "key_descriptors");
  require(descriptors.size(0) < kMostRows, "descriptors");
  require(key_descriptors.size(0) < kMostRows, "key_descriptors");
  require_tensor(labels, "labels", descriptors, ScalarType::Long, {descriptors.size(0)});
  require_tensor(key_labels, "key_labels", descriptors, ScalarType::Long, {key_descriptors.size(0)});
  require(count > 0, "count");
  return channels;
}

inline PatchGrid require_patch_grid(const Tensor& input, const IntArray& patch_size, const IntArray& stride) {
  require_floating(input, "input", input);
  const int64_t dims = input.dim() - 2;
  require((dims == 2 || dims == 3) && input.size(1) >= 2, "input");
  require(int64_t(patch_size.size()) == dims, "patch_size");
  require(int64_t(stride.size()) == dims, "stride");
  PatchGrid grid;
  grid.batch = input.size(0);
  grid.classes = input.size(1);
  for (int d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - dims);
    grid.image[d] = from < 0 ? 1 : input.size(2 + from);
    grid.patch[d] = from < 0 ? 1 : patch_size[from];
    require(grid.patch[d] > 0 && grid.patch[d] <= grid.image[d], "patch_size");
    require(from < 0 || stride[from] > 0, "stride");
    // A longer one gives the same patches, and sums of it would leave the range of integers.
    grid.stride[d] = from < 0 ? 1 : std::min(stride[from], grid.image[d]);
    grid.grid[d] = (grid.image[d] - grid.patch[d]) / grid.stride[d] + 1;
  }
  return grid;
}

// (B, *g), or (B, K, *g) with classes.
inline Shape patch_grid_shape(const Tensor& input, const PatchGrid& grid, bool classes) {
  Shape shape{grid.batch};
  if (classes) shape.push_back(grid.classes);
  for (int64_t d = 5 - input.dim(); d < 3; ++d) shape.push_back(grid.grid[d]);
  return shape;
}

inline void require_bounds(const OptionalTensor& t, const char* name, const Tensor& anchors) {
  if (!t) return;
  require_floating(*t, name, anchors);
  require(shape_of(*t) == Shape{anchors.size(0)}, name);
}

inline void require_contrast(const PatchContrastArgs& x) {
  require_floating(x.anchors, "anchors", x.anchors);
  require(x.anchors.dim() == 2 && x.anchors.size(0) < kMostRows, "anchors");
  const int64_t n = x.anchors.size(0), m = x.keys && x.keys->dim() == 2 ? x.keys->size(0) : n;
  require_tensor(x.labels, "labels", x.anchors, ScalarType::Long, {n});
  require(x.keys.has_value() == x.key_labels.has_value(), "key_labels");
  require(x.key_descriptors.has_value() == (x.keys && x.descriptors), "key_descriptors");
  if (x.keys) {
    require_tensor(*x.keys, "keys", x.anchors, x.anchors.scalar_type(), {m, x.anchors.size(1)});
    require(m < kMostRows, "keys");
    require_tensor(*x.key_labels, "key_labels", x.anchors, ScalarType::Long, {m});
  }
  const int64_t channels = x.descriptors ? require_descriptors(*x.descriptors, "descriptors", n, x.anchors) : 1;
  if (x.key_descriptors)
    require(require_descriptors(*x.key_descriptors, "key_descriptors", m, x.anchors) == channels, "key_descriptors");
  require(x.positive_mask.has_value() == x.negative_mask.has_value(), "negative_mask");
  if (x.positive_mask) {
    require_tensor(*x.positive_mask, "positive_mask", x.anchors, ScalarType::Bool, {n, m});
    require_tensor(*x.negative_mask, "negative_mask", x.anchors, ScalarType::Bool, {n, m});
  }
  require_bounds(x.positive_bounds, "max_positive_disparity", x.anchors);
  require_bounds(x.negative_bounds, "min_negative_disparity", x.anchors);
}

// What the forward pass returned and the backward pass is given besides.
inline void require_contrast_backward(const PatchContrastArgs& x, const Tensor& grad, const Tensor& max_logit,
                                      const Tensor& log_sum, const Tensor& num_positives, const Tensor& num_valid) {
  const int64_t n = x.anchors.size(0);
  const ScalarType type = accumulate_type(x.anchors);
  require_floating(grad, "grad", x.anchors);
  require(shape_of(grad) == (x.reduction == kNone ? Shape{n} : Shape{}), "grad");
  require_tensor(max_logit, "max_logit", x.anchors, ScalarType::Double, {n});
  require_tensor(log_sum, "log_sum", x.anchors, type, {n});
  require_tensor(num_positives, "num_positives", x.anchors, ScalarType::Int, {n});
  require_tensor(num_valid, "num_valid", x.anchors, ScalarType::Long, {});
}

inline void require_gaussian_contrast(const GaussianContrastArgs& x) {
  require_floating(x.anchors, "anchors", x.anchors);
  require(x.anchors.dim() == 2 && x.anchors.size(0) < kMostRows, "anchors");
  require(x.counts.dim() == 1 && x.counts.size(0) > 0, "counts");
  const int64_t n = x.anchors.size(0), depth = x.anchors.size(1), k = x.counts.size(0);
  require_tensor(x.labels, "labels", x.anchors, ScalarType::Long, {n});
  require_tensor(x.counts, "counts", x.anchors, ScalarType::Long, {k});
  require_floating(x.means, "means", x.anchors);
  require_floating(x.covariances, "covariances", x.anchors);
  const bool pairwise = x.means.dim() == 3;
  require(shape_of(x.means) == (pairwise ? Shape{k, k, depth} : Shape{k, depth}), "means");
  require(shape_of(x.covariances) == (pairwise ? Shape{k, k, depth, depth} : Shape{k, depth, depth}), "covariances");
}

}  // namespace pglcl
