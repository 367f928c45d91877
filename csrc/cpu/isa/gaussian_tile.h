// The data of one tile of anchors of the Gaussian contrastive loss (method, section 6), as in contrast_tile.h.
#pragma once

#include <stdint.h>

namespace pglcl {

// Anchors of a tile. The covariances are read once for all of them, so there is one read per kGaussianRows products.
constexpr int kGaussianRows = 32;

// Up to kGaussianRows anchors of one class. Rows are `stride` apart, a multiple of the panel, and zero beyond `depth`.
template <typename scalar_t>
struct GaussianTile {
  const scalar_t* anchors;  // (kGaussianRows, stride)
  int64_t rows, depth, stride;
  int64_t own_class, classes;
  const bool* taking_part;      // (classes,)
  const scalar_t* means;        // (classes, stride)
  const scalar_t* covariances;  // (classes, depth, stride), symmetric
  scalar_t inverse_temperature;
  scalar_t spread;      // covariance_scale / temperature^2
  scalar_t log_weight;  // log(negative_weight / participating classes), perhaps minus infinity
  scalar_t* products;   // scratch, (kGaussianRows, stride)
  scalar_t* losses;     // (rows,)
  scalar_t* gradients;  // (kGaussianRows, stride): d loss / d anchor; null: not wanted
};

}  // namespace pglcl
