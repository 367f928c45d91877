// What each op accepts, once, for every device. Messages name the argument, what was expected and what came.
//
// Nothing here reads a tensor's elements: that would synchronise a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

#include "ops.h"
#include "shared/patch_grid.h"

namespace pglcl {

inline void check_floating(const at::Tensor& t, const char* name) {
  const at::ScalarType type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                   " must be float64, float32, bfloat16 or float16, got ", type);
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on the device of ", like_name, ", ", like.device(),
                    ", got ", t.device());
}

inline void check_labels(const at::Tensor& labels, const char* name, const char* length_name, int64_t count,
                         const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, name, " must be int64, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == count, name, " must have shape (", length_name, ",) = (",
                    count, ",), got ", labels.sizes());
  check_device(labels, name, like, like_name);
}

// (N,) or (N, C); returns C.
inline int64_t check_descriptors(const at::Tensor& t, const char* name, const char* length_name, int64_t count,
                                 const at::Tensor& like, const char* like_name) {
  check_floating(t, name);
  TORCH_CHECK_VALUE((t.dim() == 1 || t.dim() == 2) && t.size(0) == count, name, " must have shape (", length_name,
                    ",) or (", length_name, ", C) with ", length_name, " = ", count, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.dim() == 1 || t.size(1) > 0, name, " must have at least one channel, got ", t.sizes());
  check_device(t, name, like, like_name);
  return t.dim() == 1 ? 1 : t.size(1);
}

inline PatchGrid check_patch_grid(const at::Tensor& input, at::IntArrayRef patch_size, at::IntArrayRef stride) {
  check_floating(input, "input");
  const int64_t dims = input.dim() - 2;
  TORCH_CHECK_VALUE(dims == 2 || dims == 3, "input must have shape (B, K, H, W) or (B, K, D, H, W), got ",
                    input.sizes());
  TORCH_CHECK_VALUE(input.size(1) >= 2, "input must have at least two classes (dimension 1), got ", input.sizes());
  TORCH_CHECK_VALUE(int64_t(patch_size.size()) == dims, "patch_size must have one entry per spatial dimension (", dims,
                    "), got ", patch_size);
  TORCH_CHECK_VALUE(int64_t(stride.size()) == dims, "stride must have one entry per spatial dimension (", dims,
                    "), got ", stride);
  PatchGrid grid;
  grid.batch = input.size(0);
  grid.classes = input.size(1);
  for (int d = 0; d < 3; ++d) {
    const int64_t from = d - (3 - dims);
    grid.image[d] = from < 0 ? 1 : input.size(2 + from);
    grid.patch[d] = from < 0 ? 1 : patch_size[from];
    grid.stride[d] = from < 0 ? 1 : stride[from];
    TORCH_CHECK_VALUE(grid.patch[d] > 0, "patch_size must be positive, got ", patch_size);
    TORCH_CHECK_VALUE(grid.stride[d] > 0, "stride must be positive, got ", stride);
    TORCH_CHECK_VALUE(grid.patch[d] <= grid.image[d], "patch_size must not exceed the image, ", input.sizes().slice(2),
                      ", got ", patch_size);
    grid.grid[d] = (grid.image[d] - grid.patch[d]) / grid.stride[d] + 1;
  }
  return grid;
}

// (B, *g), or (B, K, *g) with classes.
inline at::DimVector patch_grid_shape(const at::Tensor& input, const PatchGrid& grid, bool classes) {
  at::DimVector shape{grid.batch};
  if (classes) shape.push_back(grid.classes);
  for (int64_t d = 5 - input.dim(); d < 3; ++d) shape.push_back(grid.grid[d]);
  return shape;
}

inline int64_t check_disparity(const at::Tensor& a, const at::Tensor& b) {
  const int64_t channels = check_descriptors(a, "a", "N", a.dim() ? a.size(0) : 0, a, "a");
  const int64_t other = check_descriptors(b, "b", "M", b.dim() ? b.size(0) : 0, a, "a");
  TORCH_CHECK_VALUE(channels == other, "b must have as many channels as a, ", channels, ", got ", other);
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), "b must have the dtype of a, ", a.scalar_type(), ", got ",
                   b.scalar_type());
  return channels;
}

inline int64_t check_disparity_bounds(const at::Tensor& descriptors, const at::Tensor& labels,
                                      const at::Tensor& key_descriptors, const at::Tensor& key_labels, int64_t count,
                                      bool positives) {
  const int64_t n = descriptors.dim() ? descriptors.size(0) : 0,
                m = key_descriptors.dim() ? key_descriptors.size(0) : 0;
  const int64_t channels = check_descriptors(descriptors, "descriptors", "N", n, descriptors, "descriptors");
  const int64_t other = check_descriptors(key_descriptors, "key_descriptors", "M", m, descriptors, "descriptors");
  TORCH_CHECK_VALUE(channels == other, "key_descriptors must have as many channels as descriptors, ", channels,
                    ", got ", other);
  TORCH_CHECK_TYPE(descriptors.scalar_type() == key_descriptors.scalar_type(),
                   "key_descriptors must have the dtype of descriptors, ", descriptors.scalar_type(), ", got ",
                   key_descriptors.scalar_type());
  check_labels(labels, "labels", "N", n, descriptors, "descriptors");
  check_labels(key_labels, "key_labels", "M", m, descriptors, "descriptors");
  TORCH_CHECK_VALUE(count > 0, positives ? "num_positives" : "num_negatives", " must be at least 1, got ", count);
  return channels;
}

inline void check_embeddings(const at::Tensor& t, const char* name, const char* length_name) {
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must have shape (", length_name, ", D), got ", t.sizes());
  TORCH_CHECK_VALUE(t.size(0) < (int64_t(1) << 31), name, " must have fewer than 2^31 rows, got ", t.size(0));
}

inline void check_mask(const at::Tensor& mask, const char* name, int64_t n, int64_t m, const at::Tensor& like) {
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, name, " must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.dim() == 2 && mask.size(0) == n && mask.size(1) == m, name, " must have shape (N, M) = (", n,
                    ", ", m, "), got ", mask.sizes());
  check_device(mask, name, like, "anchors");
}

inline void check_bounds(const at::Tensor& bounds, const char* name, int64_t n, const at::Tensor& like) {
  check_floating(bounds, name);
  TORCH_CHECK_VALUE(bounds.dim() == 1 && bounds.size(0) == n, name, " must be a number or have shape (N,) = (", n,
                    ",), got ", bounds.sizes());
  check_device(bounds, name, like, "anchors");
}

inline void check_patch_contrast(const PatchContrastArgs& x) {
  check_embeddings(x.anchors, "anchors", "N");
  const int64_t n = x.anchors.size(0);
  check_labels(x.labels, "labels", "N", n, x.anchors, "anchors");
  int64_t channels = 1, m = n;
  if (x.descriptors) channels = check_descriptors(*x.descriptors, "descriptors", "N", n, x.anchors, "anchors");
  TORCH_CHECK_VALUE(x.keys.has_value() == x.key_labels.has_value(), "keys and key_labels must be given together, got ",
                    x.keys ? "keys alone" : "key_labels alone");
  if (x.keys) {
    check_embeddings(*x.keys, "keys", "M");
    m = x.keys->size(0);
    TORCH_CHECK_VALUE(x.keys->size(1) == x.anchors.size(1), "keys must have shape (M, D) with D = ", x.anchors.size(1),
                      ", got ", x.keys->sizes());
    TORCH_CHECK_TYPE(x.keys->scalar_type() == x.anchors.scalar_type(), "keys must have the dtype of anchors, ",
                     x.anchors.scalar_type(), ", got ", x.keys->scalar_type());
    check_device(*x.keys, "keys", x.anchors, "anchors");
    check_labels(*x.key_labels, "key_labels", "M", m, x.anchors, "anchors");
    TORCH_CHECK_VALUE(x.descriptors.has_value() == x.key_descriptors.has_value(),
                      "descriptors and key_descriptors must be given together when keys are, got ",
                      x.descriptors ? "descriptors alone" : "key_descriptors alone");
    if (x.key_descriptors) {
      const int64_t other = check_descriptors(*x.key_descriptors, "key_descriptors", "M", m, x.anchors, "anchors");
      TORCH_CHECK_VALUE(channels == other, "key_descriptors must have as many channels as descriptors, ", channels,
                        ", got ", other);
    }
  } else {
    TORCH_CHECK_VALUE(!x.key_descriptors, "key_descriptors need keys, got key_descriptors alone");
  }
  TORCH_CHECK_VALUE(x.positive_mask.has_value() == x.negative_mask.has_value(),
                    "positive_mask and negative_mask must be given together, got ",
                    x.positive_mask ? "positive_mask alone" : "negative_mask alone");
  if (x.positive_mask) {
    check_mask(*x.positive_mask, "positive_mask", n, m, x.anchors);
    check_mask(*x.negative_mask, "negative_mask", n, m, x.anchors);
  }
  if (x.positive_bounds) check_bounds(*x.positive_bounds, "max_positive_disparity", n, x.anchors);
  if (x.negative_bounds) check_bounds(*x.negative_bounds, "min_negative_disparity", n, x.anchors);
  TORCH_CHECK_VALUE(std::isfinite(x.temperature) && x.temperature > 0, "temperature must be a finite number > 0, got ",
                    x.temperature);
  TORCH_CHECK_VALUE(std::isfinite(x.negative_weight) && x.negative_weight >= 0,
                    "negative_weight must be a finite number >= 0, got ", x.negative_weight);
  TORCH_CHECK_VALUE(!std::isnan(x.positive_bound), "max_positive_disparity must be a number, got nan");
  TORCH_CHECK_VALUE(!std::isnan(x.negative_bound), "min_negative_disparity must be a number, got nan");
}

inline void check_gaussian_contrast(const GaussianContrastArgs& x) {
  check_embeddings(x.anchors, "anchors", "N");
  const int64_t d = x.anchors.size(1), k = x.counts.dim() == 1 ? x.counts.size(0) : 0;
  check_labels(x.labels, "labels", "N", x.anchors.size(0), x.anchors, "anchors");
  TORCH_CHECK_TYPE(x.counts.scalar_type() == at::kLong, "counts must be int64, got ", x.counts.scalar_type());
  TORCH_CHECK_VALUE(k > 0, "counts must have shape (K,) with at least one class, got ", x.counts.sizes());
  check_device(x.counts, "counts", x.anchors, "anchors");
  check_floating(x.means, "means");
  check_floating(x.covariances, "covariances");
  check_device(x.means, "means", x.anchors, "anchors");
  check_device(x.covariances, "covariances", x.anchors, "anchors");
  const bool pairwise = x.means.dim() == 3;
  TORCH_CHECK_VALUE(x.means.sizes() == (pairwise ? at::IntArrayRef{k, k, d} : at::IntArrayRef{k, d}),
                    "means must have shape (K, D) = (", k, ", ", d, ") or (K, K, D), got ", x.means.sizes());
  TORCH_CHECK_VALUE(x.covariances.sizes() == (pairwise ? at::IntArrayRef{k, k, d, d} : at::IntArrayRef{k, d, d}),
                    "covariances must have shape ", pairwise ? "(K, K, D, D)" : "(K, D, D)", " as means have ",
                    x.means.sizes(), ", got ", x.covariances.sizes());
  TORCH_CHECK_VALUE(std::isfinite(x.temperature) && x.temperature > 0, "temperature must be a finite number > 0, got ",
                    x.temperature);
  TORCH_CHECK_VALUE(std::isfinite(x.covariance_scale) && x.covariance_scale >= 0,
                    "covariance_scale must be a finite number >= 0, got ", x.covariance_scale);
  TORCH_CHECK_VALUE(std::isfinite(x.negative_weight) && x.negative_weight >= 0,
                    "negative_weight must be a finite number >= 0, got ", x.negative_weight);
}

}  // namespace pglcl
