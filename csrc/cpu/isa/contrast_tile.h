// The data of one tile of the fused contrastive loss, shared by the passes (patch_contrast_passes.cpp, compiled once)
// and the arithmetic (contrast_tile.cpp, compiled per instruction set).
#pragma once

#include <stdint.h>

#include "bfloat16_pair.h"
#include "integer_of.h"

namespace pglcl {

// Rows and columns of a tile. 128 rows of D = 128 floats take 64 KiB. So the anchors, the keys and the weights of one
// tile (3 x 64 KiB) fit into a second-level cache of 256 KiB and more.
constexpr int64_t kTile = 128;

// Distance of the rows of a tile of weights: an odd number of cache lines, so that a column uses all sets of a cache.
template <typename scalar_t>
constexpr int64_t kWeightStride = kTile + 64 / int64_t(sizeof(scalar_t));

// Distance of two kinds of partial sums of the rows, in vectors.
constexpr int64_t kRowSumRows = kTile + 2;

// Which pairs a tile can hold. This is known before any pair is computed, since the patches are sorted by label.
enum class TileKind : int8_t {
  kSame,       // one label on both sides: only positives
  kDifferent,  // no label on both sides: only negatives
  kMixed,      // anything: labels, identity and padding are compared pair by pair
  kMasked,     // explicit masks decide
};

// Distances of the rows of a tile of weights in pairs: of two keys, and of two anchors. Odd numbers of cache lines.
constexpr int64_t kKeyPairStride = kTile / 2 + 16, kAnchorPairStride = kTile + 16;

// Anchors or keys, copied into sorted order and padded with zero rows to whole panels.
template <typename scalar_t>
struct ContrastSide {
  int64_t count;
  int64_t padded;
  const scalar_t* rows;  // (padded, row_stride)
  int64_t row_stride;
  const scalar_t* finite_rows;  // the same with 0 for what is not finite
  const scalar_t* panels;       // (padded / panel, D, panel): keys only
  // Null unless bfloat16 products run in hardware; patch_pairs also in the forward pass. What is not finite needs no
  // care here, since such a problem is computed in float64.
  const Bfloat16Pair* depth_pairs;        // (padded, depth_pairs) two depths of a patch
  const Bfloat16Pair* depth_pair_panels;  // (padded / panel, depth_pairs, panel): keys only
  const Bfloat16Pair* patch_pairs;        // (padded / 2, row_stride) the same depth of two patches
  const integer_t<scalar_t>* label;       // (padded,) rank of the class, -1 in the padding
  const integer_t<scalar_t>* identity;    // (padded,) two patches with the same identity are no pair
  const scalar_t* descriptor;             // (channels, padded)
  const int32_t* index;                   // (count,) place in the caller's tensors
};

// One entry per anchor.
template <typename scalar_t>
struct ContrastState {
  const scalar_t* positive_bound;
  const scalar_t* negative_bound;
  scalar_t* max_logit;  // where exponents are measured from, unless fixed_shift
  // Forward sums over tiles, of which there may be many thousand. A tile's own sums are of scalar_t.
  double* positive_exp;
  double* negative_exp;
  double* positive_logit;  // of dots when fixed_shift, else of logits less max_logit, times kLogitUnit
  double* positive_count;
  // Backward coefficients: dL/d(dot) = {positive,negative}_coefficient * exp, less mean_coefficient for positives.
  const scalar_t* positive_coefficient;
  const scalar_t* negative_coefficient;
  const scalar_t* mean_coefficient;
};

// Logits may be close to the largest number. Scaled by this, fewer than 2^31 of them can be summed.
constexpr double kLogitUnit = 1.0 / (int64_t(1) << 32);

struct ContrastMasks {
  const bool* positive;
  const bool* negative;
  int64_t positive_stride[2];
  int64_t negative_stride[2];
};

// Private memory of one worker, each array of kTile * (kTile or the widest panel) elements.
template <typename scalar_t>
struct ContrastScratch {
  scalar_t* dots;              // one panel of products
  scalar_t* disparity;         // one panel, used when descriptors have several channels
  integer_t<scalar_t>* codes;  // one panel, used with explicit masks
  scalar_t* row_sums;          // (4, kRowSumRows) vectors of partial sums
  scalar_t* weights;           // the tile of dL/ds, (kTile, kWeightStride)
  // The weights in bfloat16, where the tile has patch_pairs.
  Bfloat16Pair* key_pairs;     // (kTile, kKeyPairStride) an anchor with two keys
  Bfloat16Pair* anchor_pairs;  // (kTile / 2, kAnchorPairStride) two anchors with a key
};

template <typename scalar_t>
struct ContrastTile {
  ContrastSide<scalar_t> anchors, keys;
  ContrastState<scalar_t> state;
  ContrastMasks masks;
  int64_t depth;                 // D
  int64_t depth_pairs;           // D / 2 rounded up
  bool finite;                   // every embedding and product is
  int64_t channels;              // descriptor channels
  bool float32_disparity;        // of double: disparities are computed as they are for float32
  bool fixed_shift;              // all exponents are known to lie in [-115, 0] once shifted: no maximum is needed
  scalar_t scale;                // with fixed_shift, log2(e) / temperature
  scalar_t shift;                // with fixed_shift, subtracted from every dot * scale
  scalar_t inverse_temperature;  // without fixed_shift
  scalar_t log_negative_weight;  // without fixed_shift, added to negatives; 0 for moderate weights
  // The keys are the anchors. Rows and columns of each tile above the diagonal are then anchors.
  bool symmetric;
  bool keys_hold_anchors;  // keys are given, and an anchor may stand among them
  // Gradients in the caller's order, through `index`, or in sorted order.
  scalar_t* grad_anchors;
  scalar_t* grad_keys;
  int64_t grad_stride;
  bool grad_indexed;
};

struct TilePosition {
  int64_t row, rows, column, columns;  // columns and rows without padding
  TileKind kind;
  bool diagonal;
};

}  // namespace pglcl
