// Copies anchors or keys into sorted order, in the layout that the tiles read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "convert.h"
#include "isa/kernel_table.h"
#include "patch_contrast.h"
#include "patch_contrast_order.h"
#include "transpose.h"

namespace pglcl {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Raises `largest` to `value`; NaN stays NaN.
inline void raise_to(double& largest, double value) {
  if (!(value <= largest) && !std::isnan(largest)) largest = value;
}

template <typename scalar_t>
struct PackedSide {
  static constexpr int64_t kNoIdentity = std::numeric_limits<int64_t>::min();

  ContrastSide<scalar_t> view{};
  double longest = 0;  // largest norm of a row; NaN or infinite when an element is

  // Arranges the data of each patch other than its embedding: label, identity, descriptors, index.
  void arrange(const Buffer<Patch>& patches, const scalar_t* descriptors, int64_t channels, int64_t identity_offset,
               int panel) {
    const int64_t count = patches.size();
    view.count = count;
    view.padded = round_up(count, panel);
    index_ = Buffer<int32_t>(std::max<int64_t>(count, 1));
    label_ = Buffer<integer_t<scalar_t>>(view.padded, -1);
    identity_ = Buffer<integer_t<scalar_t>>(view.padded, -1);
    descriptor_ = Buffer<scalar_t>(channels * view.padded, 0);
    for (int64_t i = 0; i < count; ++i) {
      index_[i] = patches[i].index;
      label_[i] = integer_t<scalar_t>(patches[i].label);
      identity_[i] = integer_t<scalar_t>(identity_offset == kNoIdentity ? -2 : patches[i].index + identity_offset);
      for (int64_t c = 0; descriptors && c < channels; ++c)
        descriptor_[c * view.padded + i] = descriptors[patches[i].index * channels + c];
    }
    view.index = index_.data();
    view.label = label_.data();
    view.identity = identity_.data();
    view.descriptor = descriptor_.data();
  }

  // Copies the embeddings into rows, and those of keys also into panels.
  void pack(const Matrix& source, int64_t depth, bool as_keys, bool for_gradient, const KernelTable& table, int workers,
            const Parallel& parallel) {
    allocate(source, depth, as_keys, for_gradient, table);
    const int64_t blocks = view.padded / panel_;
    Buffer<double> longest_of(workers, 0);
    parallel.run(workers, [&](int worker) {
      const Share share(blocks, workers, worker);
      double longest_square = 0;
      for (int64_t block = share.first; block < share.last; ++block) {
        for (int64_t i = block * panel_; i < (block + 1) * panel_; ++i) {
          prefetch_row(source, i + kRowsAhead);
          copy_row(source, i);
          if (i < view.count) raise_to(longest_square, squared_norm(rows_.data() + i * view.row_stride));
        }
        if (view.panels) fill_panel(block);
        if (view.depth_pair_panels) fill_pair_panel(block);
        if (view.patch_pairs) fill_patch_pairs(block);
      }
      longest_of[worker] = std::sqrt(longest_square);
    });
    for (int worker = 0; worker < workers; ++worker) raise_to(longest, longest_of[worker]);
    view.finite_rows = view.rows;
    if (!std::isfinite(longest)) copy_finite_rows();
  }

 private:
  void allocate(const Matrix& source, int64_t depth, bool as_keys, bool for_gradient, const KernelTable& table) {
    panel_ = table.contrast<scalar_t>().panel;
    depth_ = depth;
    pairs_ = round_up(depth, 2) / 2;
    const bool bf16 = sizeof(scalar_t) == 4 && table.bf16_products && source.dtype == ScalarType::BFloat16;
    // An odd number of cache lines per row, so that the rows of a tile spread over all sets of a cache.
    const int64_t line = 64 / sizeof(scalar_t), lines = round_up(depth, line) / line;
    view.row_stride = (lines % 2 ? lines : lines + 1) * line;
    rows_ = Buffer<scalar_t>(view.padded * view.row_stride + panel_);
    view.rows = rows_.data();
    // The last read of a panel's width may pass the end of a row.
    std::fill(rows_.data() + view.padded * view.row_stride, rows_.data() + rows_.size(), scalar_t(0));
    if (as_keys && !bf16) {
      panels_ = Buffer<scalar_t>(view.padded * depth);
      view.panels = panels_.data();
    }
    if (!bf16) return;
    depth_pairs_ = Buffer<Bfloat16Pair>(view.padded * pairs_);
    view.depth_pairs = depth_pairs_.data();
    if (for_gradient) {
      patch_pairs_ = Buffer<Bfloat16Pair>(view.padded / 2 * view.row_stride + panel_);
      view.patch_pairs = patch_pairs_.data();
    }
    if (!as_keys) return;
    depth_pair_panels_ = Buffer<Bfloat16Pair>(view.padded * pairs_);
    view.depth_pair_panels = depth_pair_panels_.data();
  }

  // Sorted patches lie anywhere in the caller's tensor, so the hardware cannot prefetch them.
  static constexpr int64_t kRowsAhead = 6;
  void prefetch_row(const Matrix& source, int64_t i) const {
    if (i >= view.count) return;
    const int64_t bytes = depth_ * size_of(source.dtype);
    const char* row = static_cast<const char*>(source.data) + index_[i] * bytes;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  // Copies row `i` of the sorted patches, with zeros beyond its depth; rows of the padding are zero.
  void copy_row(const Matrix& source, int64_t i) {
    scalar_t* row = rows_.data() + i * view.row_stride;
    const bool taken = i < view.count;
    const int64_t first = taken ? index_[i] * depth_ : 0;
    if (taken) read_elements(source.data, source.dtype, first, depth_, row);
    std::fill(row + (taken ? depth_ : 0), row + view.row_stride, scalar_t(0));
    if (!view.depth_pairs) return;
    Bfloat16Pair* pairs = depth_pairs_.data() + i * pairs_;
    std::fill(pairs, pairs + pairs_, Bfloat16Pair{});
    if (taken) std::memcpy(pairs, static_cast<const uint16_t*>(source.data) + first, depth_ * sizeof(uint16_t));
  }

  // The squared norm of a whole row, whose end is padded with zeros.
  double squared_norm(const scalar_t* row) const {
    using four = typename Square<scalar_t>::four;
    four sums[4] = {};
    for (int64_t d = 0; d < view.row_stride; d += 64 / sizeof(scalar_t))
      for (int q = 0; q < int(16 / sizeof(scalar_t)); ++q) {
        const four x = *reinterpret_cast<const four*>(row + d + 4 * q);
        sums[q] += x * x;
      }
    double square = 0;
    const four sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    for (int l = 0; l < 4; ++l) square += double(sum[l]);
    return square;
  }

  void fill_panel(int64_t block) {
    transpose(rows_.data() + block * panel_ * view.row_stride, view.row_stride, depth_,
              panels_.data() + block * panel_ * depth_, panel_);
  }

  // Puts two depths of each row side by side, for the products of pairs.
  void fill_pair_panel(int64_t block) {
    const int64_t first = block * panel_ * pairs_;
    transpose(reinterpret_cast<const int32_t*>(depth_pairs_.data()) + first, pairs_, pairs_,
              reinterpret_cast<int32_t*>(depth_pair_panels_.data()) + first, panel_);
  }

  // Puts each depth of two rows side by side, for the gradients.
  void fill_patch_pairs(int64_t block) {
    for (int64_t i = block * panel_; i < (block + 1) * panel_; i += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(depth_pairs_.data() + i * pairs_);
      const auto* odd = reinterpret_cast<const uint16_t*>(depth_pairs_.data() + (i + 1) * pairs_);
      Bfloat16Pair* pairs = patch_pairs_.data() + i / 2 * view.row_stride;
      for (int64_t d = 0; d < depth_; ++d) pairs[d] = {even[d], odd[d]};
    }
  }

  // Copies the rows with 0 for elements that are not finite. Such an element must reach gradients only through the
  // weights of its pairs: in a product it would meet the weight 0 of other pairs, and 0 times NaN is NaN.
  void copy_finite_rows() {
    finite_rows_ = Buffer<scalar_t>(rows_.size());
    for (int64_t i = 0; i < rows_.size(); ++i) finite_rows_[i] = std::isfinite(rows_[i]) ? rows_[i] : scalar_t(0);
    view.finite_rows = finite_rows_.data();
  }

  int64_t depth_ = 0, pairs_ = 0;
  int panel_ = 1;
  Buffer<scalar_t> rows_, finite_rows_, panels_, descriptor_;
  Buffer<Bfloat16Pair> depth_pairs_, depth_pair_panels_, patch_pairs_;
  Buffer<integer_t<scalar_t>> label_, identity_;
  Buffer<int32_t> index_;
};

}  // namespace pglcl
