// Tiles of the fused contrastive loss in shared memory: float32 with FFMA, 16-bit types where there are no tensor
// cores, and long rows. Rows of a depth up to 256 run on tensor cores by patch_contrast_mma.cuh.
//
// A block owns kRows rows (anchors, or keys for their gradient) and streams tiles of the others through shared memory,
// copied asynchronously, the next one while this one is worked on. The steps of a tile:
//   1. dots: rows times columns, with FFMA or on the tensor cores of a warp (mma.sync), into shared memory;
//   2. pairs: masks and exponentials, two or four threads to a row: running sums (forward) or dL/d(dot) in place
//      (backward);
//   3. backward: gradient += weights times columns, held in registers until the last tile.
// Rows that are longer than kMaxDepth, or that do not fit the shared memory, pass through it in chunks. The backward
// pass then has a block for each chunk of the gradient, and each of them computes the dots of all chunks. At a depth of
// 512 these are 2.5 times the operations. The plain kernels would instead read every key from the cache for every
// anchor. With few rows, several blocks own the same rows, and each streams a part of the others; the parts are put
// together by another kernel. No sum is added by atomics: the same bits on every run.
#pragma once

#include "patch_contrast.cuh"

namespace pglcl::cuda {

// kFfma runs on every GPU, kTensor on tensor cores in TF32.
enum class Math { kFfma, kTensor };

// Rows of a block. A gradient of 64 x 128 or 32 x 256 takes 64 registers of each of the 128 threads.
template <int kDepth>
constexpr int kRows = kDepth <= 128 ? 64 : 32;
// Columns of a tile, by element size: 64 x 256 x 2 and 32 x 256 x 4 bytes are 32 KiB each.
template <typename T>
constexpr int kColumns = sizeof(T) == 2 ? 64 : 32;
constexpr int kMaxDepth = 256;
// Depth of a chunk of longer rows: 64 + 32 rows of it and their weights take 60 KiB, which fit every GPU.
constexpr int kDepthChunk = 128;
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

constexpr int64_t rounded_to_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

using CodedPatch = Patch<float, int32_t>;

// Labels in 32 bits for the rows of a block and the columns that pass it: a row and a column have the same code where
// they have the same label. Most labels are their own code. That of another one is found by its first row in the block.
class LabelCodes {
 public:
  // The rows of the block are `count` from `first` on, or fewer, of the `total` with these labels.
  PGLCL_DEVICE LabelCodes(const int64_t* labels, int64_t first, int count, int64_t total)
      : labels_(labels + first), count_(int(total - first < count ? total - first : count)) {}

  PGLCL_DEVICE CodedPatch of(const Patch<float>& patch) const {
    return {code(patch.label), patch.descriptor, patch.counts};
  }

 private:
  static constexpr int32_t kOwn = int32_t(1) << 30;  // labels from -kOwn to kOwn - 1 are their own code

  PGLCL_DEVICE int32_t code(int64_t label) const {
    if (label >= -kOwn && label < kOwn) return int32_t(label);
    for (int r = 0; r < count_; ++r)
      if (labels_.load(r) == label) return kOwn + r;
    return -kOwn - 1;  // of no row
  }

  Global<const int64_t> labels_;
  int count_;
};

// What pairs need of a tile's columns, anchors or keys, in shared memory. kTurns: 2 to hold those of two tiles.
template <int kCount, int kTurns = 1>
class ColumnSide {
 public:
  PGLCL_DEVICE explicit ColumnSide(SharedMemory& memory)
      : label_(memory.take<int32_t>(kTurns * kCount)),
        number_(memory.take<float>(kNumbers * kTurns * kCount)),
        flags_(memory.take<int>(kTurns * kCount)) {}

  static constexpr int64_t bytes() {
    return rounded_to_16(kTurns * kCount * sizeof(int32_t)) +
           rounded_to_16(kNumbers * kTurns * kCount * sizeof(float)) + rounded_to_16(kTurns * kCount * sizeof(int));
  }
  // The part for one of the two tiles.
  PGLCL_DEVICE ColumnSide of_turn(int turn) const {
    ColumnSide side = *this;
    side.first_ = turn * kCount;
    return side;
  }

  PGLCL_DEVICE void store(int c, const CodedPatch& patch) const {
    label_.store(first_ + c, patch.label);
    store_number(kDescriptor, c, patch.descriptor);
    flags_.store(first_ + c, patch.counts);
  }
  PGLCL_DEVICE void store(int c, const CodedPatch& patch, const AnchorTerms<float>& terms) const {
    label_.store(first_ + c, patch.label);
    store_number(kDescriptor, c, patch.descriptor);
    store_number(kPositiveBound, c, terms.positive_bound);
    store_number(kNegativeBound, c, terms.negative_bound);
    store_number(kMaxLogit, c, terms.max_logit);
    store_number(kLogSum, c, terms.log_sum);
    store_number(kLogNegative, c, terms.log_negative);
    store_number(kCoefficient, c, terms.coefficient);
    store_number(kMean, c, terms.mean);
    flags_.store(first_ + c, int(patch.counts) | int(terms.counts) << 1 | int(terms.undecided) << 2);
  }

  // kGroup columns from c on. kGeneral = false leaves out what only pair_kind() asks for.
  template <int kGroup, bool kGeneral>
  PGLCL_DEVICE void patches(int c, CodedPatch (&out)[kGroup]) const {
    const auto label = label_.template load_vector<kGroup>(first_ + c);
    const auto descriptor = numbers<kGroup>(kDescriptor, c);
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
      out[k] = {label.at[k], descriptor.at[k], !kGeneral || bool(flags_.load(first_ + c + k) & 1)};
  }
  template <int kGroup, bool kGeneral>
  PGLCL_DEVICE void terms(int c, AnchorTerms<float> (&out)[kGroup]) const {
    const auto positive_bound = numbers<kGroup>(kPositiveBound, c), negative_bound = numbers<kGroup>(kNegativeBound, c);
    const auto max_logit = numbers<kGroup>(kMaxLogit, c), log_sum = numbers<kGroup>(kLogSum, c);
    const auto log_negative = numbers<kGroup>(kLogNegative, c);
    const auto coefficient = numbers<kGroup>(kCoefficient, c), mean = numbers<kGroup>(kMean, c);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int flags = kGeneral ? flags_.load(first_ + c + k) : 2;
      out[k] = {positive_bound.at[k], negative_bound.at[k], max_logit.at[k], log_sum.at[k],  log_negative.at[k],
                coefficient.at[k],    mean.at[k],           bool(flags & 2), bool(flags & 4)};
    }
  }

 private:
  enum { kDescriptor, kPositiveBound, kNegativeBound, kMaxLogit, kLogSum, kLogNegative, kCoefficient, kMean, kNumbers };

  PGLCL_DEVICE void store_number(int which, int c, float value) const {
    number_.store(which * kTurns * kCount + first_ + c, value);
  }
  template <int kGroup>
  PGLCL_DEVICE Vector<float, kGroup> numbers(int which, int c) const {
    return number_.template load_vector<kGroup>(which * kTurns * kCount + first_ + c);
  }

  Shared<int32_t> label_;
  Shared<float> number_;
  Shared<int> flags_;  // for pair_kind(): bit 0, the patch counts; 1, its terms do; 2, they are undecided
  int first_ = 0;
};

// Memory to merge what the threads of a block know of the keys.
class ScanMemory {
 public:
  static constexpr int kWarps = kContrastThreads / 32;
  PGLCL_DEVICE explicit ScanMemory(SharedMemory& memory)
      : counts_(memory.take<int>(2 * kWarps)), range_(memory.take<float>(2 * kWarps)) {}
  static constexpr int64_t bytes() { return 2 * rounded_to_16(2 * kWarps * sizeof(float)); }

  PGLCL_DEVICE KeyScan<float> merged(KeyScan<float> scan) const {
    for (int lane = 16; lane > 0; lane /= 2) {
      KeyScan<float> other;
      other.counted = shuffle_xor(scan.counted, lane);
      other.unknown = shuffle_xor(scan.unknown, lane);
      other.lowest = shuffle_xor(scan.lowest, lane);
      other.highest = shuffle_xor(scan.highest, lane);
      scan.merge(other);
    }
    if (thread_index() % 32 == 0) {
      const int at = thread_index() / 32 * 2;
      counts_.store(at, scan.counted);
      counts_.store(at + 1, scan.unknown);
      range_.store(at, scan.lowest);
      range_.store(at + 1, scan.highest);
    }
    sync_threads();
    KeyScan<float> all;
    for (int at = 0; at < 2 * kWarps; at += 2)
      all.merge({counts_.load(at), counts_.load(at + 1), range_.load(at), range_.load(at + 1)});
    return all;
  }

 private:
  Shared<int> counts_;
  Shared<float> range_;
};

// Whether the anchor is one of the keys first_key to last_key - 1, and counts there.
template <typename T>
PGLCL_DEVICE bool is_its_own_key(const ContrastArguments<T>& x, int64_t anchor, int64_t first_key, int64_t last_key) {
  const int64_t key = anchor + x.self_offset;
  return x.self_offset >= 0 && key >= first_key && key < last_key && load_patch(x, key, false).counts;
}

template <typename T>
constexpr int64_t tile_shared_bytes(int64_t depth, int stages) {
  const int64_t rows = depth <= 128 ? kRows<128> : kRows<256>;
  return rounded_to_16(rows * row_stride<T>(depth) * sizeof(T)) +
         rounded_to_16(int64_t(stages) * kColumns<T> * row_stride<T>(depth) * sizeof(T)) +
         rounded_to_16(rows * kWeightStride<T> * sizeof(float)) + ColumnSide<kColumns<T>>::bytes() +
         ScanMemory::bytes() + WeightScale<float>::bytes() + rounded_to_16(2 * sizeof(int));
}

// --- copies ----------------------------------------------------------------------------------------------------------

// Which pieces of 16 bytes of a tile this thread copies. This is found once, so that no copy divides.
struct CopyPlan {
  int row, chunk, rows_on, chunks_on, chunks;

  // A tile has `all` chunks of 16 bytes per row.
  PGLCL_DEVICE explicit CopyPlan(int all)
      : row(thread_index() / all),
        chunk(thread_index() % all),
        rows_on(kContrastThreads / all),
        chunks_on(kContrastThreads % all),
        chunks(all) {}

  PGLCL_DEVICE void advance(int& r, int& c) const {
    r += rows_on;
    c += chunks_on;
    if (c >= chunks) {
      c -= chunks;
      ++r;
    }
  }
};

// `count` rows starting at `first` of a (total, depth) matrix, from column `start` on; rows and columns past its end
// become zeros.
template <typename T>
PGLCL_DEVICE void copy_rows(const CopyPlan& plan, const Shared<T>& to, int at, int stride, const Global<const T>& from,
                            int64_t first, int count, int64_t total, int64_t depth, int64_t start = 0) {
  constexpr int kElements = 16 / sizeof(T);
  const int rows_left = int(total - first < count ? total - first : count);
  int r = plan.row, c = plan.chunk;
  while (r < count) {
    const int d = c * kElements;
    const bool beyond = r >= rows_left || start + d >= depth;
    to.copy_async(at + r * stride + d, from, beyond ? 0 : (first + r) * depth + start + d, beyond);
    plan.advance(r, c);
  }
}

// Load what pairs need of a tile's columns. In the forward pass these are keys. In the backward pass they are keys, or
// anchors, and have terms if they are anchors of the pairs.
template <typename T, int kCount>
PGLCL_DEVICE void load_columns(const ContrastArguments<T>& x, const LabelCodes& codes, int64_t first,
                               const ColumnSide<kCount>& columns, KeyScan<float>& scan) {
  for (int c = thread_index(); c < kCount; c += kContrastThreads) {
    const CodedPatch patch = codes.of(load_patch(x, first + c, false));
    scan.add(patch);
    columns.store(c, patch);
  }
}
template <typename T, int kCount>
PGLCL_DEVICE void load_columns(const ContrastArguments<T>& x, const LabelCodes& codes,
                               const ContrastGradients<float>& g, float root, int64_t first, bool are_anchors,
                               bool have_terms, const ColumnSide<kCount>& columns) {
  for (int c = thread_index(); c < kCount; c += kContrastThreads) {
    const CodedPatch patch = codes.of(load_patch(x, first + c, are_anchors));
    columns.store(c, patch, have_terms ? load_terms<T>(x, g, root, first + c, patch) : no_terms<T>());
  }
}

// The column of a tile that is the row's own patch; -1 if none is.
PGLCL_DEVICE int own_column(int64_t row, int64_t shift, int64_t first, int count) {
  const int64_t c = row + shift - first;
  return c >= 0 && c < count ? int(c) : -1;
}

// --- step 1: dots ----------------------------------------------------------------------------------------------------

// FFMA: a thread has every sixteenth row and every eighth column; 16 bytes of depth per load. more: adds to what is
// there.
template <typename T, int kRowCount>
PGLCL_DEVICE void dots_ffma(const Shared<T>& rows, const Shared<T>& columns, int column_at, int64_t depth, bool more,
                            const Shared<float>& out) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kOwnRows = kRowCount / 16, kOwnColumns = kColumns<T> / 8;
  const int stride = row_stride<T>(depth), steps = padded_depth<T>(depth);
  const int row = thread_index() / 8, column = thread_index() % 8;
  float sums[kOwnRows][kOwnColumns] = {};
  for (int d = 0; d < steps; d += kElements) {
    Vector<T, kElements> a[kOwnRows];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) a[r] = rows.template load_vector<kElements>((row + 16 * r) * stride + d);
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      const Vector<T, kElements> b = columns.template load_vector<kElements>(column_at + (column + 8 * c) * stride + d);
#pragma unroll
      for (int e = 0; e < kElements; ++e)
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) sums[r][c] += widen(a[r].at[e]) * widen(b.at[e]);
    }
  }
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      const int place = (row + 16 * r) * kWeightStride<T> + column + 8 * c;
      out.store(place, more ? out.load(place) + sums[r][c] : sums[r][c]);
    }
}

// Tensor cores, TF32: a warp has all rows and a quarter of the columns. Fragments are laid out as mma.sync has them in
// the PTX ISA.
template <int kRowCount>
PGLCL_DEVICE void dots_tensor(const Shared<float>& rows, const Shared<float>& columns, int column_at, int64_t depth,
                              bool more, const Shared<float>& out) {
  constexpr int kBands = kRowCount / 16;           // of 16 rows
  constexpr int kTiles = kColumns<float> / 4 / 8;  // of 8 columns, per warp
  const int stride = row_stride<float>(depth), steps = padded_depth<float>(depth);
  const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
  const int first_column = thread_index() / 32 * (kColumns<float> / 4);
  float sums[kBands][kTiles][4] = {};
  for (int d = 0; d < steps; d += 8) {
    uint32_t a[kBands][4];
#pragma unroll
    for (int m = 0; m < kBands; ++m)
#pragma unroll
      for (int w = 0; w < 4; ++w)
        a[m][w] = to_tf32(rows.load((16 * m + group + 8 * (w % 2)) * stride + d + 4 * (w / 2) + within));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t b[2];
#pragma unroll
      for (int w = 0; w < 2; ++w)
        b[w] = to_tf32(columns.load(column_at + (first_column + 8 * n + group) * stride + d + 4 * w + within));
#pragma unroll
      for (int m = 0; m < kBands; ++m) mma_tf32(sums[m][n], a[m], b);
    }
  }
#pragma unroll
  for (int m = 0; m < kBands; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place =
            (16 * m + group + 8 * (i / 2)) * kWeightStride<float> + first_column + 8 * n + 2 * within + i % 2;
        out.store(place, more ? out.load(place) + sums[m][n][i] : sums[m][n][i]);
      }
}

template <typename T, Math kMath, int kRowCount>
PGLCL_DEVICE void compute_dots(const Shared<T>& rows, const Shared<T>& columns, int column_at, int64_t depth, bool more,
                               const Shared<float>& out) {
  if constexpr (kMath == Math::kTensor)
    dots_tensor<kRowCount>(rows, columns, column_at, depth, more, out);
  else
    dots_ffma<T, kRowCount>(rows, columns, column_at, depth, more, out);
}

// --- step 3: gradient += weights (rows x columns) times columns (columns x depth) ------------------------------------

// A column that is not finite makes the weights of the rows that use it NaN. For the other rows, whose weight is 0, it
// must count as 0, too. kFinite: the tile holds no such column.
template <bool kFinite>
PGLCL_DEVICE float finite(float x) {
  return kFinite || x - x == 0 ? x : 0.0f;
}

// FFMA: a warp has a quarter of the rows, a lane every 32nd depth.
template <typename T, int kDepth>
struct GradientFfma {
  static constexpr int kOwnRows = kRows<kDepth> / 4, kPerLane = kDepth / 32;
  float sums[kOwnRows][kPerLane];

  PGLCL_DEVICE GradientFfma() {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) sums[r][c] = 0;
  }

  template <bool kFinite>
  PGLCL_DEVICE void add(const Shared<float>& weights, const Shared<T>& columns, int column_at, int64_t depth) {
    constexpr int kGroup = 4;  // columns at once
    const int stride = row_stride<T>(depth), width = padded_depth<T>(depth);
    const int row = thread_index() / 32 * kOwnRows, lane = thread_index() % 32;
    for (int j = 0; j < kColumns<T>; j += kGroup) {
      float values[kGroup][kPerLane];
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          const int d = lane + 32 * c;
          values[e][c] = d < width ? finite<kFinite>(widen(columns.load(column_at + (j + e) * stride + d))) : 0.0f;
        }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const Vector<float, kGroup> w = weights.template load_vector<kGroup>((row + r) * kWeightStride<T> + j);
#pragma unroll
        for (int e = 0; e < kGroup; ++e)
#pragma unroll
          for (int c = 0; c < kPerLane; ++c) sums[r][c] += w.at[e] * values[e][c];
      }
    }
  }

  template <typename Write>
  PGLCL_DEVICE void write(int64_t depth, Write write_one) const {
    const int row = thread_index() / 32 * kOwnRows, lane = thread_index() % 32;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
      for (int c = 0; c < kPerLane; ++c)
        if (lane + 32 * c < depth) write_one(row + r, lane + 32 * c, sums[r][c]);
  }
};

// TF32: a warp has all rows and a quarter of the depth. Rows pass in chunks, which have kDepth columns.
template <typename T, int kDepth>
struct GradientTensor {
  static constexpr int kBands = kRows<kDepth> / 16;  // of 16 rows
  static constexpr int kTiles = kDepth / 4 / 8;      // of 8 depths, per warp
  float sums[kBands][kTiles][4];

  PGLCL_DEVICE GradientTensor() {
#pragma unroll
    for (int m = 0; m < kBands; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  }

  template <bool kFinite>
  PGLCL_DEVICE void add(const Shared<float>& weights, const Shared<T>& columns, int column_at, int64_t depth) {
    const int stride = row_stride<T>(depth);
    const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
    const int first = thread_index() / 32 * (kDepth / 4);
    for (int j = 0; j < kColumns<T>; j += 8) {
      uint32_t a[kBands][4];
#pragma unroll
      for (int m = 0; m < kBands; ++m)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          a[m][w] = to_tf32(weights.load((16 * m + group + 8 * (w % 2)) * kWeightStride<T> + j + within + 4 * (w / 2)));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int w = 0; w < 2; ++w)
          b[w] = to_tf32(
              finite<kFinite>(widen(columns.load(column_at + (j + within + 4 * w) * stride + first + 8 * n + group))));
#pragma unroll
        for (int m = 0; m < kBands; ++m) mma_tf32(sums[m][n], a[m], b);
      }
    }
  }

  template <typename Write>
  PGLCL_DEVICE void write(int64_t depth, Write write_one) const {
    const int lane = thread_index() % 32, group = lane / 4, within = lane % 4;
    const int first = thread_index() / 32 * (kDepth / 4);
#pragma unroll
    for (int m = 0; m < kBands; ++m)
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

// --- the kernels -----------------------------------------------------------------------------------------------------

// Shared memory of a block, taken in the order that tile_shared_bytes counts.
template <typename T, int kRowCount>
struct TileMemory {
  Shared<T> rows, columns;
  Shared<float> weights;
  ColumnSide<kColumns<T>> side;
  ScanMemory scan;
  WeightScale<float> scale;
  Shared<int> seen;  // counts so far: of threads with a dot that is not finite, of warps with a weight that is not 0

  PGLCL_DEVICE TileMemory(SharedMemory& memory, int64_t depth, int stages)
      : rows(memory.take<T>(kRowCount * row_stride<T>(depth))),
        columns(memory.take<T>(stages * kColumns<T> * row_stride<T>(depth))),
        weights(memory.take<float>(kRowCount * kWeightStride<T>)),
        side(memory),
        scan(memory),
        scale(memory),
        seen(memory.take<int>(2)) {}
};

// The rows of a block, and the columns that pass it: those of the tiles from first_tile to last_tile - 1.
template <typename T>
struct Operands {
  Global<const T> rows, columns;
  int64_t first_row, row_count, column_count, depth, first_tile, last_tile;

  // The columns are shared out among `parts` blocks of the same rows, in whole tiles.
  PGLCL_DEVICE Operands(const T* rows_data, const T* columns_data, int64_t first, int64_t of_rows, int64_t of_columns,
                        int64_t elements, int part, int parts)
      : rows(rows_data),
        columns(columns_data),
        first_row(first),
        row_count(of_rows),
        column_count(of_columns),
        depth(elements) {
    const int64_t tiles = (column_count + kColumns<T> - 1) / kColumns<T>, share = (tiles + parts - 1) / parts;
    first_tile = part * share;
    last_tile = first_tile + share < tiles ? first_tile + share : tiles;
  }
};

// Streams the block's columns past its rows: with two stages the next tile is copied while this one is worked on.
// load_side(first column) brings what belongs to a tile's columns, the dots go into memory.weights, and work(first
// column, place of the tile in memory.columns) runs between barriers.
template <typename T, Math kMath, int kRowCount, typename Side, typename Work>
PGLCL_DEVICE void stream_columns(const TileMemory<T, kRowCount>& memory, const Operands<T>& x, int stages,
                                 Side load_side, Work work) {
  const int stride = row_stride<T>(x.depth), tile_size = kColumns<T> * stride;
  const CopyPlan plan(padded_depth<T>(x.depth) * int(sizeof(T)) / 16);
  if (x.first_tile >= x.last_tile) return;
  const auto copy_tile = [&](int64_t tile, int stage) {
    copy_rows<T>(plan, memory.columns, stage * tile_size, stride, x.columns, tile * kColumns<T>, kColumns<T>,
                 x.column_count, x.depth);
    commit_copies();
  };
  copy_rows<T>(plan, memory.rows, 0, stride, x.rows, x.first_row, kRowCount, x.row_count, x.depth);
  copy_tile(x.first_tile, 0);
  for (int64_t tile = x.first_tile; tile < x.last_tile; ++tile) {
    const int stage = stages == 2 ? int((tile - x.first_tile) % 2) : 0;
    if (stages == 2 && tile + 1 < x.last_tile) {
      copy_tile(tile + 1, 1 - stage);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    load_side(tile * kColumns<T>);
    sync_threads();
    compute_dots<T, kMath, kRowCount>(memory.rows, memory.columns, stage * tile_size, x.depth, false, memory.weights);
    sync_threads();
    work(tile * kColumns<T>, stage * tile_size);
    sync_threads();  // the tile and its side may be overwritten
    if (stages == 1 && tile + 1 < x.last_tile) copy_tile(tile + 1, 0);
  }
}

// The same for longer rows. Shared memory holds a chunk of the rows and columns at a time. Chunk number `last` comes
// last, and is there while work runs.
template <typename T, Math kMath, int kRowCount, typename Side, typename Work>
PGLCL_DEVICE void stream_chunks(const TileMemory<T, kRowCount>& memory, const Operands<T>& x, int last, Side load_side,
                                Work work) {
  const int stride = row_stride<T>(kDepthChunk);
  const CopyPlan plan(kDepthChunk * int(sizeof(T)) / 16);
  const int chunks = int((x.depth + kDepthChunk - 1) / kDepthChunk);
  for (int64_t tile = x.first_tile; tile < x.last_tile; ++tile) {
    const int64_t first = tile * kColumns<T>;
    load_side(first);
    for (int k = 1; k <= chunks; ++k) {
      const int chunk = last + k < chunks ? last + k : last + k - chunks;
      const int64_t start = int64_t(chunk) * kDepthChunk;
      copy_rows<T>(plan, memory.rows, 0, stride, x.rows, x.first_row, kRowCount, x.row_count, x.depth, start);
      copy_rows<T>(plan, memory.columns, 0, stride, x.columns, first, kColumns<T>, x.column_count, x.depth, start);
      commit_copies();
      wait_copies<0>();
      sync_threads();
      compute_dots<T, kMath, kRowCount>(memory.rows, memory.columns, 0, kDepthChunk, k > 1, memory.weights);
      sync_threads();
    }
    work(first, 0);
    sync_threads();
  }
}

// kDepth: the largest depth that fits. kDeep: rows pass in chunks of that depth. kGeneral: masks or several channels
// decide which pairs count, instead of pair_kind_by_rule.
template <typename T, Math kMath, int kDepth, bool kGeneral, bool kDeep>
PGLCL_KERNEL contrast_forward_tiles(ContrastArguments<T> x, ContrastSums<float> out, ContrastParts parts, int stages) {
  constexpr int kThreadsPerRow = kContrastThreads / kRows<kDepth>;  // neighbours, in step 2
  constexpr int kPairs = kColumns<T> / kThreadsPerRow;
  SharedMemory shared;
  const TileMemory<T, kRows<kDepth>> memory(shared, kDeep ? kDepthChunk : x.depth, stages);
  const int64_t first_row = int64_t(block_index()) * kRows<kDepth>;
  const int row = thread_index() / kThreadsPerRow, part = thread_index() % kThreadsPerRow;
  const int64_t i = first_row + row;
  const LabelCodes codes(x.labels, first_row, kRows<kDepth>, x.n);
  const CodedPatch anchor = codes.of(load_patch(x, i, true));
  const AnchorTerms<float> terms = load_terms<T>(x, i, anchor);
  RunningSums<float> sums;
  KeyScan<float> scan;
  const auto load_side = [&](int64_t first) { load_columns<T>(x, codes, first, memory.side, scan); };
  const auto sum_pairs = [&](int64_t first, int) {
    const int self = x.self_offset < 0 ? -1 : own_column(i, x.self_offset, first, kColumns<T>);
    float logits[kPairs];
    uint32_t positive = 0, negative = 0;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int c = part + kThreadsPerRow * k;
      CodedPatch key[1];
      memory.side.template patches<1, kGeneral>(c, key);
      PairKind kind;
      if constexpr (kGeneral) {
        kind = pair_kind(x, i, anchor, first + c, key[0], terms);
        sums.undecided = sums.undecided || kind.undecided;
      } else {
        kind = pair_kind_by_rule(anchor, key[0], terms.positive_bound, terms.negative_bound);
        if (c == self) kind = {false, false, false};
      }
      logits[k] = pair_logit(x, memory.weights.load(row * kWeightStride<T> + c));
      if (!kind.positive && !kind.negative) logits[k] = kLowest<float>;
      positive |= uint32_t(kind.positive) << k;
      negative |= uint32_t(kind.negative) << k;
    }
    sums.add(logits, positive, kGeneral ? negative : ~positive);
  };
  const Operands<T> operands(x.anchors, x.keys, first_row, x.n, x.m, x.depth, block_index_y(), parts.count);
  if constexpr (kDeep)
    stream_chunks<T, kMath>(memory, operands, 0, load_side, sum_pairs);
  else
    stream_columns<T, kMath>(memory, operands, stages, load_side, sum_pairs);
  for (int lanes = 1; lanes < kThreadsPerRow; lanes *= 2) sums.merge(lanes);
  if constexpr (!kGeneral)
    sums.undecided = memory.scan.merged(scan).undecided(
        anchor, terms, is_its_own_key(x, i, operands.first_tile * kColumns<T>, operands.last_tile * kColumns<T>));
  if (part != 0 || i >= x.n) return;
  if (parts.count > 1)
    parts.store(block_index_y(), i, sums);
  else
    sums.write(i, x.log_weight, out);
}

// own_anchor, own_key: as in contrast_backward_plain. A block's index in y tells its part of the columns, and the chunk
// of the gradient that it holds.
template <typename T, Math kMath, int kDepth, bool kGeneral, bool kDeep>
PGLCL_KERNEL contrast_backward_tiles(ContrastArguments<T> x, ContrastGradients<float> g, GradientParts<T> out,
                                     bool own_anchor, bool own_key, int stages) {
  SharedMemory shared;
  const int64_t width = kDeep ? kDepthChunk : x.depth;              // of the gradient of this block
  constexpr int kThreadsPerRow = kContrastThreads / kRows<kDepth>;  // neighbours, in step 2
  const TileMemory<T, kRows<kDepth>> memory(shared, width, stages);
  memory.scale.find(x, g);
  const int64_t first_row = int64_t(block_index()) * kRows<kDepth>;
  const int64_t rows = own_anchor ? x.n : x.m, columns = own_anchor ? x.m : x.n;
  const int row = thread_index() / kThreadsPerRow, part = thread_index() % kThreadsPerRow;
  const int64_t i = first_row + row;
  const LabelCodes codes(own_anchor ? x.labels : x.key_labels, first_row, kRows<kDepth>, rows);
  const CodedPatch own = codes.of(load_patch(x, i, own_anchor));
  const AnchorTerms<float> own_terms = own_anchor ? load_terms<T>(x, g, memory.scale.root(), i, own) : no_terms<T>();
  typename GradientOf<T, kMath, kDepth>::type gradient;
  if (thread_index() < 2) memory.seen.store(thread_index(), 0);
  int infinite_before = 0, weights_before = 0;
  const auto load_side = [&](int64_t first) {
    load_columns<T>(x, codes, g, memory.scale.root(), first, !own_anchor, own_key, memory.side);
  };
  const auto weigh = [&](int64_t first, int at) {
    const int self =
        x.self_offset < 0 ? -1 : own_column(i, own_anchor ? x.self_offset : -x.self_offset, first, kColumns<T>);
    float infinite = 0;  // NaN after a dot that is not finite
    bool used = false;
    for (int c = part; c < kColumns<T>; c += kThreadsPerRow) {
      const int place = row * kWeightStride<T> + c;
      const float dot = memory.weights.load(place);
      CodedPatch others[1];
      memory.side.template patches<1, kGeneral>(c, others);
      const CodedPatch& other = others[0];
      infinite = multiply_add(dot, 0.0f, infinite);
      float weight = 0;
      if (own_anchor) {
        const PairKind kind = kGeneral
                                  ? pair_kind(x, i, own, first + c, other, own_terms)
                                  : pair_kind_by_rule(own, other, own_terms.positive_bound, own_terms.negative_bound);
        weight += pair_weight(x, kind, own_terms, dot);
      }
      if (own_key) {
        AnchorTerms<float> all_terms[1];
        memory.side.template terms<1, kGeneral>(c, all_terms);
        const AnchorTerms<float>& terms = all_terms[0];
        const PairKind kind = kGeneral ? pair_kind(x, first + c, other, i, own, terms)
                                       : pair_kind_by_rule(other, own, terms.positive_bound, terms.negative_bound);
        weight += pair_weight(x, kind, terms, dot);
      }
      if (c == self) weight = 0;
      used = used || weight != 0;
      memory.weights.store(place, weight);
    }
    if (infinite != 0) memory.seen.atomic_add(0, 1);
    if (ballot(used) != 0 && thread_index() % 32 == 0) memory.seen.atomic_add(1, 1);
    sync_threads();
    // The same in all threads. A tile whose weights are all 0 adds nothing.
    const bool finite_dots = memory.seen.load(0) == infinite_before, no_weights = memory.seen.load(1) == weights_before;
    infinite_before = memory.seen.load(0);
    weights_before = memory.seen.load(1);
    if (no_weights) return;
    if (finite_dots)
      gradient.template add<true>(memory.weights, memory.columns, at, width);
    else
      gradient.template add<false>(memory.weights, memory.columns, at, width);
  };
  const int chunks = kDeep ? int((x.depth + kDepthChunk - 1) / kDepthChunk) : 1;
  const int of_gradient = block_index_y() % chunks, of_columns = block_index_y() / chunks;
  const Operands<T> operands(own_anchor ? x.anchors : x.keys, own_anchor ? x.keys : x.anchors, first_row, rows, columns,
                             x.depth, of_columns, out.count);
  if constexpr (kDeep)
    stream_chunks<T, kMath>(memory, operands, of_gradient, load_side, weigh);
  else
    stream_columns<T, kMath>(memory, operands, stages, load_side, weigh);
  // If the loss of an anchor is NaN, so is its gradient.
  if (part == 0) memory.weights.store(row * kWeightStride<T>, own_terms.log_sum != own_terms.log_sum ? NAN : 0.0f);
  sync_threads();
  const bool in_parts = out.count > 1;
  const float inverse_root = in_parts ? 1 : memory.scale.inverse_root();
  const Global<T> grad(out.gradient);
  const Global<float> sums(out.sums);
  const int64_t start = int64_t(of_gradient) * kDepthChunk;
  gradient.write(x.depth - start, [&](int r, int d, float sum) {
    if (first_row + r >= rows) return;
    const int64_t at = (first_row + r) * x.depth + start + d;
    const float value = times_square(sum, inverse_root) + memory.weights.load(r * kWeightStride<T>);
    if (in_parts)
      sums.store(of_columns * out.size + at, value);
    else
      grad.store(at, narrow<T>(value));
  });
}

}  // namespace pglcl::cuda
