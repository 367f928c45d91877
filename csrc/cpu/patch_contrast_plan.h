// Prepares a contrastive problem: sorts it (patch_contrast_order.h), packs it (patch_contrast_pack.h), and hands it out
// tile by tile (patch_contrast_tasks.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "isa/kernel_table.h"
#include "patch_contrast.h"
#include "patch_contrast_order.h"
#include "patch_contrast_pack.h"
#include "patch_contrast_tasks.h"

namespace pglcl {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Subtracting a bound B of all logits (Cauchy-Schwarz) leaves exponents in [-2 B, 0]. While 2^-2B is a normal float, no
// maximum per anchor is needed.
constexpr double kLargestFixedShift = 57.0;

// Larger products, or logits in units of log 2, might not fit into a float.
constexpr double kLargestInFloat32 = 1e37;

// For fewer multiply-adds, a second thread takes more time than it saves.
constexpr double kSerialWork = 1 << 21;

template <typename scalar_t>
class ContrastPlan {
 public:
  ContrastPlan(const ContrastInputs<scalar_t>& inputs, bool for_gradient, const Parallel& parallel)
      : inputs_(inputs), parallel_(parallel), table_(kernel_table()), masked_(inputs.masks.positive != nullptr) {
    order_patches();
    workers_ = worth_threads() ? std::max(1, parallel.threads) : 1;
    anchors_.pack(inputs.anchors, inputs.depth, inputs.symmetric(), for_gradient, table_, workers_, parallel);
    if (!inputs.symmetric()) keys_.pack(inputs.keys, inputs.depth, true, for_gradient, table_, workers_, parallel);
    set_bounds();
    set_tile();
    row_ranges_ = block_ranges(tile_.anchors, true);
    if (!inputs.symmetric()) column_ranges_ = block_ranges(tile_.keys, false);
  }

  const ContrastTile<scalar_t>& tile() const { return tile_; }
  ContrastTile<scalar_t>& tile() { return tile_; }
  int64_t count() const { return anchors_.view.count; }
  int64_t padded() const { return anchors_.view.padded; }
  int32_t index(int64_t i) const { return anchors_.view.index[i]; }
  int workers() const { return workers_; }
  const ContrastKernels<scalar_t>& kernels() const { return table_.contrast<scalar_t>(); }
  double weight_of_sums() const { return weight_of_sums_; }

  // Whether a logit may leave the range of float32, or an embedding is beyond it.
  bool needs_float64() const { return sizeof(scalar_t) == 4 && !(largest_number_ <= kLargestInFloat32); }

  // From now on, no pair of this anchor counts.
  void leave_out(int64_t i) {
    positive_bound_[i] = -std::numeric_limits<scalar_t>::infinity();
    negative_bound_[i] = std::numeric_limits<scalar_t>::infinity();
  }

  // Measures exponents from a bound of all logits, or from the largest logit of each anchor. A moderate weight of
  // negatives multiplies the sums: if its logarithm were added to a large logit, it would be rounded away.
  void measure_exponents(bool fixed_shift) {
    const double weight = inputs_.negative_weight;
    const bool moderate = fixed_shift || (weight >= 1e-20 && weight <= 1e20);
    tile_.fixed_shift = fixed_shift;
    tile_.log_negative_weight = moderate ? scalar_t(0) : scalar_t(std::log(weight));
    weight_of_sums_ = moderate ? weight : 1;
  }

  // Whether a descriptor or bound that is not a number leaves it open which pairs of an anchor count.
  bool undecided(int64_t i) const {
    if (masked_) return false;
    const ContrastSide<scalar_t>& keys = tile_.keys;
    if (std::isnan(positive_bound_[i]) || std::isnan(negative_bound_[i])) return keys.count > own_key(i);
    if (!inputs_.descriptors) return false;
    const bool own = unordered(anchors_.view, i);
    if (own && keys.count - own_key(i) > 0) return true;
    return undecided_keys_ - (own && own_key(i) ? 1 : 0) > 0;
  }

  // Calls one of the kernels for every tile that can count.
  void run(typename ContrastKernels<scalar_t>::Function function) {
    const int64_t rows = blocks(tile_.anchors), columns = blocks(tile_.keys);
    if (rows == 0 || columns == 0) return;
    if (rows == 1 && columns == 1) {
      Scratch scratch(kernels(), tile_.keys.patch_pairs);
      return run_tile(function, {}, scratch);
    }
    StepQueue queue(rows, columns, inputs_.symmetric());
    parallel_.run(int(std::min<int64_t>(workers_, rows * columns)), [&](int) {
      const Arena::Call call;
      Scratch scratch(kernels(), tile_.keys.patch_pairs);
      for (Step step; queue.take(step); queue.finish(step)) run_tile(function, step, scratch);
    });
  }

 private:
  // Labels and descriptors of one block of kTile sorted patches.
  struct BlockRange {
    int64_t first_label, last_label;
    double lowest, highest;                 // descriptor
    double positive_bound, negative_bound;  // the largest and the smallest of the block
  };

  struct Scratch {
    Buffer<scalar_t> dots, disparity, row_sums, weights;
    Buffer<integer_t<scalar_t>> codes;
    Buffer<Bfloat16Pair> key_pairs, anchor_pairs;
    ContrastScratch<scalar_t> view;
    Scratch(const ContrastKernels<scalar_t>& kernels, bool pairs)
        : dots(kTile * kernels.panel),
          disparity(kTile * kernels.panel),
          row_sums(kRowSumRows * 4 * kernels.lanes),
          weights(kTile * kWeightStride<scalar_t>),
          codes(kTile * kernels.panel),
          key_pairs(pairs ? kTile * kKeyPairStride : 0),
          anchor_pairs(pairs ? kTile / 2 * kAnchorPairStride : 0),
          view{dots.data(),    disparity.data(), codes.data(),       row_sums.data(),
               weights.data(), key_pairs.data(), anchor_pairs.data()} {}
  };

  static int64_t blocks(const ContrastSide<scalar_t>& side) { return (side.count + kTile - 1) / kTile; }

  void order_patches() {
    const auto sorted = [&](const Matrix& side, const int64_t* labels, const scalar_t* descriptors) {
      return sorted_patches(side.rows, labels, descriptors, inputs_.channels, inputs_.ignore_index, !masked_);
    };
    Buffer<Patch> anchors = sorted(inputs_.anchors, inputs_.labels, inputs_.descriptors), keys;
    if (!inputs_.symmetric()) keys = sorted(inputs_.keys, inputs_.key_labels, inputs_.key_descriptors);
    rank_labels(anchors, keys);
    // Identities that are never equal: -2 for anchors that are no key, an index for keys, and -1 for padding.
    const int64_t offset = inputs_.symmetric()        ? 0
                           : inputs_.self_offset >= 0 ? inputs_.self_offset
                                                      : PackedSide<scalar_t>::kNoIdentity;
    const int panel = kernels().panel;
    anchors_.arrange(anchors, inputs_.descriptors, inputs_.channels, offset, panel);
    if (!inputs_.symmetric()) keys_.arrange(keys, inputs_.key_descriptors, inputs_.channels, 0, panel);
  }

  bool worth_threads() const {
    const int64_t keys = inputs_.symmetric() ? anchors_.view.count : keys_.view.count;
    return double(anchors_.view.count) * keys * std::max<int64_t>(inputs_.depth, 1) >= kSerialWork;
  }

  bool unordered(const ContrastSide<scalar_t>& side, int64_t i) const {
    for (int64_t c = 0; c < inputs_.channels; ++c)
      if (!std::isfinite(side.descriptor[c * side.padded + i])) return true;
    return false;
  }

  int64_t own_key(int64_t i) const {
    if (inputs_.symmetric()) return 1;
    if (inputs_.self_offset < 0) return 0;
    const int64_t key = index(i) + inputs_.self_offset;
    return key < inputs_.keys.rows && inputs_.key_labels[key] != inputs_.ignore_index ? 1 : 0;
  }

  void set_bounds() {
    const int64_t padded = anchors_.view.padded;
    positive_bound_ = Buffer<scalar_t>(padded, inputs_.positive_bound);
    negative_bound_ = Buffer<scalar_t>(padded, inputs_.negative_bound);
    for (int64_t i = 0; i < anchors_.view.count; ++i) {
      if (inputs_.positive_bounds) positive_bound_[i] = inputs_.positive_bounds[index(i)];
      if (inputs_.negative_bounds) negative_bound_[i] = inputs_.negative_bounds[index(i)];
    }
  }

  void set_tile() {
    tile_ = ContrastTile<scalar_t>{};
    tile_.anchors = anchors_.view;
    tile_.keys = inputs_.symmetric() ? anchors_.view : keys_.view;
    tile_.state.positive_bound = positive_bound_.data();
    tile_.state.negative_bound = negative_bound_.data();
    tile_.masks = inputs_.masks;
    tile_.depth = inputs_.depth;
    tile_.depth_pairs = round_up(inputs_.depth, 2) / 2;
    tile_.channels = inputs_.channels;
    tile_.float32_disparity = inputs_.float32_disparity;
    tile_.symmetric = inputs_.symmetric();
    tile_.keys_hold_anchors = inputs_.self_offset >= 0;
    const double longest_key = inputs_.symmetric() ? anchors_.longest : keys_.longest;
    tile_.finite = std::isfinite(anchors_.longest) && std::isfinite(longest_key);
    const double product = anchors_.longest * longest_key, bound = product / inputs_.temperature * kLog2E;
    largest_number_ = std::isnan(product) ? product : std::max(product, bound);
    const double weight = inputs_.negative_weight;
    tile_.scale = scalar_t(kLog2E / inputs_.temperature);
    tile_.shift = scalar_t(bound);
    tile_.inverse_temperature = scalar_t(1 / inputs_.temperature);
    measure_exponents(bound <= kLargestFixedShift && (weight == 0 || (weight >= 1e-6 && weight <= 1e6)));
    if (inputs_.descriptors)
      for (int64_t j = 0; j < tile_.keys.count; ++j) undecided_keys_ += unordered(tile_.keys, j);
  }

  Buffer<BlockRange> block_ranges(const ContrastSide<scalar_t>& side, bool anchors) const {
    Buffer<BlockRange> ranges(blocks(side));
    for (int64_t b = 0; b < ranges.size(); ++b) {
      const int64_t first = b * kTile, last = std::min<int64_t>(first + kTile, side.count);
      BlockRange range{side.label[first],
                       side.label[first],
                       double(side.descriptor[first]),
                       double(side.descriptor[first]),
                       -std::numeric_limits<double>::infinity(),
                       std::numeric_limits<double>::infinity()};
      for (int64_t i = first; i < last; ++i) {
        range.first_label = std::min<int64_t>(range.first_label, side.label[i]);
        range.last_label = std::max<int64_t>(range.last_label, side.label[i]);
        range.lowest = std::min(range.lowest, double(side.descriptor[i]));
        range.highest = std::max(range.highest, double(side.descriptor[i]));
        if (anchors) {
          range.positive_bound = std::max(range.positive_bound, double(positive_bound_[i]));
          range.negative_bound = std::min(range.negative_bound, double(negative_bound_[i]));
        }
      }
      ranges[b] = range;
    }
    return ranges;
  }

  // Bounds of the disparities between the descriptors of two blocks, and the bounds that their anchors set. They hold
  // for the disparities that the kernels compute, since rounded subtraction is monotonic.
  double nearest(const BlockRange& a, const BlockRange& b) const {
    return std::max({0.0, difference(a.lowest, b.highest), difference(b.lowest, a.highest)});
  }
  double farthest(const BlockRange& a, const BlockRange& b) const {
    return std::max(difference(a.highest, b.lowest), difference(b.highest, a.lowest));
  }
  double difference(double a, double b) const {
    return inputs_.float32_disparity ? double(float(a) - float(b)) : double(scalar_t(a) - scalar_t(b));
  }
  double largest_positive_bound(const BlockRange& rows, const BlockRange& columns) const {
    return inputs_.symmetric() ? std::max(rows.positive_bound, columns.positive_bound) : rows.positive_bound;
  }
  double least_negative_bound(const BlockRange& rows, const BlockRange& columns) const {
    return inputs_.symmetric() ? std::min(rows.negative_bound, columns.negative_bound) : rows.negative_bound;
  }

  // The kind of a tile; false when no pair of it can count.
  bool classify(const Step& step, TileKind& kind) const {
    const BlockRange& rows = row_ranges_[step.row_block];
    const BlockRange& columns = (inputs_.symmetric() ? row_ranges_ : column_ranges_)[step.column_block];
    const bool diagonal = inputs_.symmetric() && step.row_block == step.column_block;
    const bool may_share_identity = diagonal || tile_.keys_hold_anchors;
    const int64_t width = std::min<int64_t>(kTile, tile_.keys.count - step.column_block * kTile);
    if (masked_) {
      kind = TileKind::kMasked;
      return true;
    }
    const bool same = rows.first_label == rows.last_label && columns.first_label == columns.last_label &&
                      rows.first_label == columns.first_label;
    const bool different = rows.last_label < columns.first_label || columns.last_label < rows.first_label;
    if (inputs_.channels == 1 && undecided_keys_ == 0) {
      if (same && nearest(rows, columns) > largest_positive_bound(rows, columns)) return false;
      if (different && farthest(rows, columns) < least_negative_bound(rows, columns)) return false;
    }
    kind = TileKind::kMixed;
    if (width % table_.contrast<scalar_t>().panel == 0) {
      if (same && !may_share_identity) kind = TileKind::kSame;
      if (different && !tile_.keys_hold_anchors) kind = TileKind::kDifferent;
    }
    return true;
  }

  TilePosition position(const Step& step, TileKind kind) const {
    const int64_t row = step.row_block * kTile, column = step.column_block * kTile;
    return {row,    std::min<int64_t>(kTile, tile_.anchors.count - row),
            column, std::min<int64_t>(kTile, tile_.keys.count - column),
            kind,   inputs_.symmetric() && step.row_block == step.column_block};
  }

  void run_tile(typename ContrastKernels<scalar_t>::Function function, const Step& step, const Scratch& scratch) const {
    TileKind kind;
    if (classify(step, kind)) function(tile_, position(step, kind), scratch.view);
  }

  const ContrastInputs<scalar_t>& inputs_;
  const Parallel& parallel_;
  const KernelTable& table_;
  bool masked_;
  int workers_ = 1;
  int64_t undecided_keys_ = 0;
  double weight_of_sums_ = 1, largest_number_ = 0;
  PackedSide<scalar_t> anchors_, keys_;
  Buffer<scalar_t> positive_bound_, negative_bound_;
  ContrastTile<scalar_t> tile_;
  Buffer<BlockRange> row_ranges_, column_ranges_;
};

}  // namespace pglcl
