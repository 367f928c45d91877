// The fast kernels of the fused contrastive loss: float32, bfloat16 and float16, depth up to 256.
//
// A block owns kRows rows (anchors, or keys for their gradient) and streams tiles of the others through shared memory,
// copied asynchronously, the next one while this one is worked on. The steps of a tile:
//   1. dots: rows times columns, on the tensor cores of a warp (mma.sync) or with FFMA, into shared memory;
//   2. pairs: masks and exponentials, four threads to a row: running sums (forward) or dL/d(dot) in place (backward);
//   3. backward: gradient += weights times columns, held in registers until the last tile.
// Every row of every output is written by the block that owns it: no atomics, the same bits on every run.
#pragma once

#include "patch_contrast.cuh"

namespace pglcl::cuda {

// FFMA everywhere, or tensor cores: TF32 for float32, 16-bit operands for the others. Gradients of 16-bit inputs go
// through TF32, which holds them exactly and keeps the weights' range.
enum class Math { kFfma, kTensor };

// 32 rows: with 128 threads the gradient of 32 x 256 takes 64 registers each.
constexpr int kRows = 32;
// Columns of a tile, by element size: 64 x 256 x 2 and 32 x 256 x 4 bytes are 32 KiB each.
template <typename T>
constexpr int kColumns = sizeof(T) == 2 ? 64 : 32;
constexpr int kMaxDepth = 256;
// Pads rows of the weights so that the lanes of a fragment (4 rows x 8 columns) meet 32 banks.
template <typename T>
constexpr int kWeightStride = kColumns<T> + 4;

template <typename T>
PGLCL_HOST_DEVICE constexpr int padded_depth(int64_t depth) {
  return int((depth + 15) / 16 * 16);  // a multiple of the depth of one mma, filled with zeros
}
// 16 more bytes per row, for the same reason as kWeightStride.
template <typename T>
PGLCL_HOST_DEVICE constexpr int row_stride(int64_t depth) {
  return padded_depth<T>(depth) + 16 / int(sizeof(T));
}

// The anchors of a tile's columns, or its keys.
template <typename scalar_t>
struct ColumnSide {
  Shared<int64_t> label;
  Shared<scalar_t> descriptor, positive_bound, negative_bound, shift, coefficient, mean;
};

template <typename T>
constexpr int64_t tile_shared_bytes(int64_t depth, int stages) {
  const auto rounded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  return rounded(int64_t(kRows) * row_stride<T>(depth) * sizeof(T)) +
         rounded(int64_t(stages) * kColumns<T> * row_stride<T>(depth) * sizeof(T)) +
         rounded(int64_t(kRows) * kWeightStride<T> * sizeof(float)) + rounded(kColumns<T> * sizeof(int64_t)) +
         6 * rounded(kColumns<T> * sizeof(float));
}

// --- copies
// ------------------------------------------------------------------------------------------------------------------

// `count` rows starting at `first` of a (total, depth) matrix; rows and columns past its end become zeros.
template <typename T>
PGLCL_DEVICE void copy_rows(Shared<T> to, int at, Global<const T> from, int64_t first, int count, int64_t total,
                            int64_t depth) {
  constexpr int kElements = 16 / sizeof(T);
  const int stride = row_stride<T>(depth), chunks = padded_depth<T>(depth) / kElements;
  for (int chunk = thread_index(); chunk < count * chunks; chunk += kContrastThreads) {
    const int r = chunk / chunks, d = chunk % chunks * kElements;
    const bool beyond = first + r >= total || d >= depth;
    to.copy_async(at + r * stride + d, from, beyond ? 0 : (first + r) * depth + d, beyond);
  }
}

template <typename T>
PGLCL_DEVICE void load_columns(const ContrastArguments<T>& x, int64_t first, bool as_anchors,
                               const ColumnSide<float>& columns) {
  for (int c = thread_index(); c < kColumns<T>; c += kContrastThreads) {
    const Patch<float> patch = load_patch(x, first + c, as_anchors);
    columns.label.store(c, patch.label);
    columns.descriptor.store(c, patch.descriptor);
  }
}

template <typename T>
PGLCL_DEVICE void load_column_terms(const ContrastArguments<T>& x, const ContrastGradients<float>& g, int64_t first,
                                    bool as_anchors, const ColumnSide<float>& columns) {
  for (int c = thread_index(); c < kColumns<T>; c += kContrastThreads) {
    // Only anchors have terms; those of keys are never looked at.
    const AnchorTerms<float> terms = load_terms<T>(x, g, as_anchors ? first + c : x.n);
    columns.positive_bound.store(c, terms.positive_bound);
    columns.negative_bound.store(c, terms.negative_bound);
    columns.shift.store(c, terms.shift);
    columns.coefficient.store(c, terms.coefficient);
    columns.mean.store(c, terms.mean);
  }
}

// --- step 1: dots
// -------------------------------------------------------------------------------------------------------------

// FFMA: a thread has 2 rows and every eighth column; 16 bytes of depth per load.
template <typename T>
PGLCL_DEVICE void dots_ffma(const Shared<T>& rows, const Shared<T>& columns, int column_at, int64_t depth,
                            const Shared<float>& out) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kPerThread = kColumns<T> / 8;
  const int stride = row_stride<T>(depth), steps = padded_depth<T>(depth);
  const int row = thread_index() / 8 * 2, column = thread_index() % 8;
  float sums[2][kPerThread] = {};
  for (int d = 0; d < steps; d += kElements) {
    const Vector<T, kElements> a0 = rows.template load_vector<kElements>(row * stride + d);
    const Vector<T, kElements> a1 = rows.template load_vector<kElements>((row + 1) * stride + d);
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      const Vector<T, kElements> b = columns.template load_vector<kElements>(column_at + (column + 8 * c) * stride + d);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sums[0][c] += widen(a0.at[e]) * widen(b.at[e]);
        sums[1][c] += widen(a1.at[e]) * widen(b.at[e]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) out.store((row + r) * kWeightStride<T> + column + 8 * c, sums[r][c]);
}

// Fragments of an operand whose depth is contiguous: rows r, r + 8 and two depths per register for 16-bit elements, one
// for TF32 (the layouts of mma.sync in the PTX ISA).
template <typename T>
struct Fragments;

template <>
struct Fragments<float> {
  static constexpr int kDepth = 8;
  PGLCL_DEVICE static uint32_t word(const Shared<float>& s, int i, int within) { return to_tf32(s.load(i + within)); }
  static constexpr int kNext = 4;  // from the first to the second half of the depth
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(d, a, b); }
};
template <typename T>
struct Fragments16 {
  static constexpr int kDepth = 16;
  static constexpr int kNext = 8;
  PGLCL_DEVICE static uint32_t word(const Shared<T>& s, int i, int within) {
    const Vector<T, 2> pair = s.template load_vector<2>(i + 2 * within);
    return pair.at[0].bits | uint32_t(pair.at[1].bits) << 16;
  }
};
template <>
struct Fragments<BFloat16> : Fragments16<BFloat16> {
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
};
template <>
struct Fragments<Float16> : Fragments16<Float16> {
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b); }
};

// Tensor cores: a warp has all rows and a quarter of the columns.
template <typename T>
PGLCL_DEVICE void dots_tensor(const Shared<T>& rows, const Shared<T>& columns, int column_at, int64_t depth,
                              const Shared<float>& out) {
  using F = Fragments<T>;
  constexpr int kTiles = kColumns<T> / 4 / 8;  // of 8 columns, per warp
  const int stride = row_stride<T>(depth), steps = padded_depth<T>(depth);
  const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
  const int first_column = thread_index() / 32 * (kColumns<T> / 4);
  float sums[2][kTiles][4] = {};
  for (int d = 0; d < steps; d += F::kDepth) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int w = 0; w < 4; ++w)
        a[m][w] = F::word(rows, (16 * m + group + 8 * (w % 2)) * stride + d + F::kNext * (w / 2), within);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t b[2];
#pragma unroll
      for (int w = 0; w < 2; ++w)
        b[w] = F::word(columns, column_at + (first_column + 8 * n + group) * stride + d + F::kNext * w, within);
      F::mma(sums[0][n], a[0], b);
      F::mma(sums[1][n], a[1], b);
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out.store((16 * m + group + 8 * (i / 2)) * kWeightStride<T> + first_column + 8 * n + 2 * within + i % 2,
                  sums[m][n][i]);
}

template <typename T, Math kMath>
PGLCL_DEVICE void compute_dots(const Shared<T>& rows, const Shared<T>& columns, int column_at, int64_t depth,
                               const Shared<float>& out) {
  if constexpr (kMath == Math::kTensor)
    dots_tensor<T>(rows, columns, column_at, depth, out);
  else
    dots_ffma<T>(rows, columns, column_at, depth, out);
}

// --- step 3: gradient += weights (kRows x kColumns) times columns (kColumns x depth)
// ------------------------------------------

// FFMA: a warp has 8 rows, a lane every 32nd depth.
template <typename T, int kDepth>
struct GradientFfma {
  static constexpr int kPerLane = kDepth / 32;
  float sums[8][kPerLane];

  PGLCL_DEVICE GradientFfma() {
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) sums[r][c] = 0;
  }

  PGLCL_DEVICE void add(const Shared<float>& weights, const Shared<T>& columns, int column_at, int64_t depth) {
    const int stride = row_stride<T>(depth), width = padded_depth<T>(depth);
    const int row = thread_index() / 32 * 8, lane = thread_index() % 32;
    for (int j = 0; j < kColumns<T>; ++j) {
      float w[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) w[r] = weights.load((row + r) * kWeightStride<T> + j);
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        if (lane + 32 * c >= width) break;
        const float value = widen(columns.load(column_at + j * stride + lane + 32 * c));
#pragma unroll
        for (int r = 0; r < 8; ++r) sums[r][c] += w[r] * value;
      }
    }
  }

  template <typename Write>
  PGLCL_DEVICE void write(int64_t depth, Write write_one) const {
    const int row = thread_index() / 32 * 8, lane = thread_index() % 32;
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int c = 0; c < kPerLane; ++c)
        if (lane + 32 * c < depth) write_one(row + r, lane + 32 * c, sums[r][c]);
  }
};

// TF32: a warp has all rows and a quarter of the depth.
template <typename T, int kDepth>
struct GradientTensor {
  static constexpr int kTiles = kDepth / 4 / 8;  // of 8 depths, per warp
  float sums[2][kTiles][4];

  PGLCL_DEVICE GradientTensor() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  }

  PGLCL_DEVICE void add(const Shared<float>& weights, const Shared<T>& columns, int column_at, int64_t depth) {
    const int stride = row_stride<T>(depth), width = padded_depth<T>(depth);
    const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
    const int first = thread_index() / 32 * (kDepth / 4);
    for (int j = 0; j < kColumns<T>; j += 8) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          a[m][w] = to_tf32(weights.load((16 * m + group + 8 * (w % 2)) * kWeightStride<T> + j + within + 4 * (w / 2)));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (first + 8 * n >= width) break;  // the same in all lanes
        uint32_t b[2];
#pragma unroll
        for (int w = 0; w < 2; ++w)
          b[w] = to_tf32(widen(columns.load(column_at + (j + within + 4 * w) * stride + first + 8 * n + group)));
        mma_tf32(sums[0][n], a[0], b);
        mma_tf32(sums[1][n], a[1], b);
      }
    }
  }

  template <typename Write>
  PGLCL_DEVICE void write(int64_t depth, Write write_one) const {
    const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
    const int first = thread_index() / 32 * (kDepth / 4);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int d = first + 8 * n + 2 * within + i % 2;
          if (d < depth) write_one(16 * m + group + 8 * (i / 2), d, sums[m][n][i]);
        }
  }
};

template <typename T, Math kMath, int kDepth>
struct GradientOf {
  using type = GradientFfma<T, kDepth>;
};
template <typename T, int kDepth>
struct GradientOf<T, Math::kTensor, kDepth> {
  using type = GradientTensor<T, kDepth>;
};

// --- the kernels
// ----------------------------------------------------------------------------------------------------------------

// Shared memory of a block, taken in the order that tile_shared_bytes counts.
template <typename T>
struct TileMemory {
  Shared<T> rows, columns;
  Shared<float> weights;
  ColumnSide<float> side;

  PGLCL_DEVICE TileMemory(SharedMemory& memory, int64_t depth, int stages)
      : rows(memory.take<T>(kRows * row_stride<T>(depth))),
        columns(memory.take<T>(stages * kColumns<T> * row_stride<T>(depth))),
        weights(memory.take<float>(kRows * kWeightStride<T>)),
        side{memory.take<int64_t>(kColumns<T>), memory.take<float>(kColumns<T>), memory.take<float>(kColumns<T>),
             memory.take<float>(kColumns<T>),   memory.take<float>(kColumns<T>), memory.take<float>(kColumns<T>),
             memory.take<float>(kColumns<T>)} {}
};

// Streams all columns past the block's rows: with two stages the next tile is copied while this one is worked on.
// work(first column, place of the tile in memory.columns) runs between barriers.
template <typename T, typename Work>
PGLCL_DEVICE void stream_columns(const TileMemory<T>& memory, Global<const T> rows, int64_t first_row,
                                 int64_t row_count, Global<const T> columns, int64_t column_count, int64_t depth,
                                 int stages, Work work) {
  const int tile_size = kColumns<T> * row_stride<T>(depth);
  const int64_t tiles = (column_count + kColumns<T> - 1) / kColumns<T>;
  copy_rows<T>(memory.rows, 0, rows, first_row, kRows, row_count, depth);
  copy_rows<T>(memory.columns, 0, columns, 0, kColumns<T>, column_count, depth);
  commit_copies();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int stage = stages == 2 ? int(tile % 2) : 0;
    if (stages == 2 && tile + 1 < tiles) {
      copy_rows<T>(memory.columns, (1 - stage) * tile_size, columns, (tile + 1) * kColumns<T>, kColumns<T>,
                   column_count, depth);
      commit_copies();
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    work(tile * kColumns<T>, stage * tile_size);
    sync_threads();  // the tile and its side may be overwritten
    if (stages == 1 && tile + 1 < tiles) {
      copy_rows<T>(memory.columns, 0, columns, (tile + 1) * kColumns<T>, kColumns<T>, column_count, depth);
      commit_copies();
    }
  }
}

template <typename scalar_t>
PGLCL_DEVICE Patch<scalar_t> column_patch(const ColumnSide<scalar_t>& side, int c, int64_t index, int64_t count) {
  return {index < count ? index : -1, side.label.load(c), side.descriptor.load(c)};
}

template <typename T, Math kMath>
PGLCL_KERNEL contrast_forward_tiles(ContrastArguments<T> x, float* lse, float* logit, int32_t* count, int stages) {
  SharedMemory shared;
  const TileMemory<T> memory(shared, x.depth, stages);
  const int64_t first_row = int64_t(block_index()) * kRows;
  // Four neighbouring threads share a row in step 2.
  const int row = thread_index() / 4, quarter = thread_index() % 4;
  const Patch<float> anchor = load_patch(x, first_row + row, true);
  const AnchorTerms<float> terms = load_terms<T>(x, first_row + row);
  RunningSums<float> sums;
  stream_columns<T>(memory, x.anchors, first_row, x.n, x.keys, x.m, x.depth, stages, [&](int64_t first, int at) {
    load_columns<T>(x, first, false, memory.side);
    sync_threads();
    compute_dots<T, kMath>(memory.rows, memory.columns, at, x.depth, memory.weights);
    sync_threads();
    for (int c = quarter; c < kColumns<T>; c += 4) {
      const PairKind kind =
          decide(x, anchor, column_patch(memory.side, c, first + c, x.m), terms.positive_bound, terms.negative_bound);
      sums.meet(x, kind, memory.weights.load(row * kWeightStride<T> + c));
    }
  });
  sums.merge(1);
  sums.merge(2);
  if (quarter == 0 && first_row + row < x.n) sums.write(x, first_row + row, lse, logit, count);
}

// own_anchor, own_key: as in contrast_backward_plain.
template <typename T, Math kMath, int kDepth>
PGLCL_KERNEL contrast_backward_tiles(ContrastArguments<T> x, ContrastGradients<float> g, T* grad_data, bool own_anchor,
                                     bool own_key, int stages) {
  SharedMemory shared;
  const TileMemory<T> memory(shared, x.depth, stages);
  const int64_t first_row = int64_t(block_index()) * kRows;
  const int64_t rows = own_anchor ? x.n : x.m, columns = own_anchor ? x.m : x.n;
  const int row = thread_index() / 4, quarter = thread_index() % 4;
  const Patch<float> own = load_patch(x, first_row + row, own_anchor);
  const AnchorTerms<float> own_terms = load_terms<T>(x, g, own_anchor ? first_row + row : x.n);
  typename GradientOf<T, kMath, kDepth>::type gradient;
  stream_columns<T>(
      memory, own_anchor ? x.anchors : x.keys, first_row, rows, own_anchor ? x.keys : x.anchors, columns, x.depth,
      stages, [&](int64_t first, int at) {
        load_columns<T>(x, first, !own_anchor, memory.side);
        load_column_terms<T>(x, g, first, own_key, memory.side);
        sync_threads();
        compute_dots<T, kMath>(memory.rows, memory.columns, at, x.depth, memory.weights);
        sync_threads();
        for (int c = quarter; c < kColumns<T>; c += 4) {
          const int place = row * kWeightStride<T> + c;
          const float dot = memory.weights.load(place);
          const Patch<float> other = column_patch(memory.side, c, first + c, columns);
          float weight = 0;
          if (own_anchor)
            weight += pair_weight(x, decide(x, own, other, own_terms.positive_bound, own_terms.negative_bound),
                                  own_terms, dot);
          if (own_key) {
            const AnchorTerms<float> terms{memory.side.positive_bound.load(c), memory.side.negative_bound.load(c),
                                           memory.side.shift.load(c), memory.side.coefficient.load(c),
                                           memory.side.mean.load(c)};
            weight += pair_weight(x, decide(x, other, own, terms.positive_bound, terms.negative_bound), terms, dot);
          }
          memory.weights.store(place, weight);
        }
        sync_threads();
        gradient.add(memory.weights, memory.columns, at, x.depth);
      });
  // An anchor whose loss is no number has no gradient that is one.
  if (quarter == 0)
    memory.weights.store(row * kWeightStride<T>, own_anchor && own_terms.shift != own_terms.shift ? NAN : 0.0f);
  sync_threads();
  const Global<T> grad(grad_data);
  gradient.write(x.depth, [&](int r, int d, float value) {
    if (first_row + r < rows)
      grad.store((first_row + r) * x.depth + d, narrow<T>(value + memory.weights.load(r * kWeightStride<T>)));
  });
}

}  // namespace pglcl::cuda
