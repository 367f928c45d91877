// The fused contrastive loss on tensor cores (sm_80 and later), depth up to 256: 16-bit types, and float32 rounded to
// TF32.
//
// A block owns kMmaRows rows (anchors, or keys for their gradient), 16 for each of its four warps, and streams tiles of
// the others through shared memory, copied asynchronously, the next one while this one is worked on. A warp keeps what
// it computes of its rows in registers: products (step 1), logits or weights of the pairs (step 2), and gradients (step
// 3), for which the weights become an operand of mma.sync as they lie. One barrier per tile; no atomics: the same bits
// on every run.
#pragma once

#include "patch_contrast_tiles.cuh"

namespace pglcl::cuda {

constexpr int kMmaRows = 64;

// kHeld, below: a warp holds its rows in registers. Otherwise it reads them from shared memory for every tile. The
// forward pass holds them where the depth is small. In the backward pass the gradient takes the registers.
template <typename T, int kDepth>
constexpr bool kHeldForward = kDepth * sizeof(T) <= 256;
// Columns of a tile. Where the depth and the gradient leave few registers, a half or a quarter as many.
template <int kDepth, bool kHeld>
constexpr int kMmaColumns = kHeld           ? 64
                            : kDepth <= 128 ? 32
                                            : 16;
// Elements that 16 bytes hold. A lane names as many to ldmatrix, and a thread copies as many at once.
template <typename T>
constexpr int kChunk = 16 / int(sizeof(T));
// Rows in shared memory are 16 bytes longer, so that the eight rows of a matrix meet 32 banks.
template <typename T, int kDepth>
constexpr int kMmaStride = kDepth + kChunk<T>;
// Depth that one load of four matrices brings: operands of two mma.sync.
template <typename T>
constexpr int kMmaStep = 4 * kChunk<T>;

template <int kDepth, bool kHeld>
using MmaSide = ColumnSide<kMmaColumns<kDepth, kHeld>, 2>;

template <typename T, int kDepth, bool kHeld>
constexpr int64_t mma_shared_bytes(int stages) {
  const int64_t row = int64_t(kMmaStride<T, kDepth>) * int64_t(sizeof(T));
  return (kHeld ? 0 : kMmaRows * row) + stages * kMmaColumns<kDepth, kHeld> * row + MmaSide<kDepth, kHeld>::bytes() +
         ScanMemory::bytes() + WeightScale<float>::bytes();
}

// What differs between the types. operand(): a word of a row as mma.sync takes it.
template <typename T>
struct TensorCore;
template <>
struct TensorCore<BFloat16> {
  static constexpr uint32_t kExponent = 0x7f80;
  PGLCL_DEVICE static uint32_t operand(uint32_t word) { return word; }
  PGLCL_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
};
template <>
struct TensorCore<Float16> {
  static constexpr uint32_t kExponent = 0x7c00;
  PGLCL_DEVICE static uint32_t operand(uint32_t word) { return word; }
  PGLCL_DEVICE static uint32_t pack(float low, float high) { return pack_f16(low, high); }
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b); }
};
template <>
struct TensorCore<float> {
  PGLCL_DEVICE static uint32_t operand(uint32_t word) { return to_tf32(bits_float(word)); }
  PGLCL_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(d, a, b); }
};

// operand() of the four words that a thread holds of four matrices.
template <typename T>
PGLCL_DEVICE void to_operands(uint32_t (&words)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = TensorCore<T>::operand(words[w]);
}

// Two numbers, 0 in the place of one that is not finite.
template <typename T>
PGLCL_DEVICE uint32_t finite_halves(uint32_t pair) {
  constexpr uint32_t kExponent = TensorCore<T>::kExponent;
  const uint32_t low = (pair & kExponent) == kExponent ? 0 : pair & 0xffffu;
  const uint32_t high = (pair >> 16 & kExponent) == kExponent ? 0 : pair & 0xffff0000u;
  return low | high;
}

template <typename T, int kDepth, bool kHeld>
struct MmaMemory {
  static constexpr int kColumns = kMmaColumns<kDepth, kHeld>;
  static constexpr int kTileSize = kColumns * kMmaStride<T, kDepth>;
  Shared<T> rows, columns;
  MmaSide<kDepth, kHeld> side;
  ScanMemory scan;
  WeightScale<float> scale;

  PGLCL_DEVICE MmaMemory(SharedMemory& memory, int stages)
      : rows(memory.take<T>(kHeld ? 0 : kMmaRows * kMmaStride<T, kDepth>)),
        columns(memory.take<T>(stages * kTileSize)),
        side(memory),
        scan(memory),
        scale(memory) {}
};

// The 16 rows of a warp as operand A of mma.sync, in steps of two chunks of depth.
template <typename T, int kDepth, bool kHeld>
class RowFragments {
 public:
  // The rows of the block lie at `at` in `memory`.
  PGLCL_DEVICE void load(const Shared<T>& memory, int at, int64_t depth) {
    memory_ = memory;
    at_ = at + (thread_index() / 32 * 16 + thread_index() % 16) * kMmaStride<T, kDepth> +
          thread_index() % 32 / 16 * kChunk<T>;
    if constexpr (kHeld) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s % 2 == 0 && kStep * s >= depth) break;
        read(s, held_[s]);
      }
    }
  }
  PGLCL_DEVICE void get(int step, uint32_t (&a)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int w = 0; w < 4; ++w) a[w] = held_[step][w];
    } else {
      read(step, a);
    }
  }
  PGLCL_DEVICE explicit RowFragments(const Shared<T>& memory) : memory_(memory), at_(0) {}

 private:
  static constexpr int kStep = kMmaStep<T> / 2, kSteps = kDepth / kStep;

  PGLCL_DEVICE void read(int step, uint32_t (&a)[4]) const {
    memory_.load_matrices(at_ + kStep * step, a);
    to_operands<T>(a);
  }

  Shared<T> memory_;
  int at_;
  uint32_t held_[kHeld ? kSteps : 1][4];
};

// Step 1. products[t][2 r + c]: row group + 8 r of the warp times column 8 t + 2 within + c of the tile, where lane =
// 4 group + within.
template <typename T, int kDepth, bool kHeld, int kTiles>
PGLCL_DEVICE void multiply_rows(const RowFragments<T, kDepth, kHeld>& rows, const Shared<T>& columns, int at,
                                int64_t depth, float (&products)[kTiles][4]) {
  const int lane = thread_index() % 32;
  const int mine = at + lane % 8 * kMmaStride<T, kDepth> + lane / 8 * kChunk<T>;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) products[t][i] = 0;
#pragma unroll
  for (int d = 0; d < kDepth; d += kMmaStep<T>) {
    if (d >= depth) break;  // the same in all threads
    uint32_t first[4], second[4];
    rows.get(d / kMmaStep<T> * 2, first);
    rows.get(d / kMmaStep<T> * 2 + 1, second);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t b[4];
      columns.load_matrices(mine + 8 * t * kMmaStride<T, kDepth> + d, b);
      to_operands<T>(b);
      TensorCore<T>::mma(products[t], first, {b[0], b[1]});
      TensorCore<T>::mma(products[t], second, {b[2], b[3]});
    }
  }
}

// Step 3. gradient[n][2 r + c]: row group + 8 r, depth 8 n + 2 within + c. kFinite as in patch_contrast_tiles.cuh.
template <typename T, int kDepth, bool kFinite, int kTiles>
  requires(sizeof(T) == 2)
PGLCL_DEVICE void add_columns(const float (&weights)[kTiles][4], const Shared<T>& columns, int at, int64_t depth,
                              float (&gradient)[kDepth / 8][4]) {
  const int lane = thread_index() % 32;
  const int mine = at + lane % 16 * kMmaStride<T, kDepth> + lane / 16 * 8;
#pragma unroll
  for (int t = 0; t < kTiles; t += 2) {
    // What a thread holds of two tiles of products is its part of operand A.
    const uint32_t a[4] = {TensorCore<T>::pack(weights[t][0], weights[t][1]),
                           TensorCore<T>::pack(weights[t][2], weights[t][3]),
                           TensorCore<T>::pack(weights[t + 1][0], weights[t + 1][1]),
                           TensorCore<T>::pack(weights[t + 1][2], weights[t + 1][3])};
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) {
      if (d % kMmaStep<T> == 0 && d >= depth) break;
      uint32_t b[4];
      columns.load_matrices_transposed(mine + 8 * t * kMmaStride<T, kDepth> + d, b);
      if constexpr (!kFinite) {
#pragma unroll
        for (int w = 0; w < 4; ++w) b[w] = finite_halves<T>(b[w]);
      }
      TensorCore<T>::mma(gradient[d / 8], a, {b[0], b[1]});
      TensorCore<T>::mma(gradient[d / 8 + 1], a, {b[2], b[3]});
    }
  }
}

// The same in TF32. A thread holds columns 2 within + c of a tile of products, where operand A has columns within +
// 4 c. Columns are only summed over: they are renumbered in both operands.
template <typename T, int kDepth, bool kFinite, int kTiles>
  requires(sizeof(T) == 4)
PGLCL_DEVICE void add_columns(const float (&weights)[kTiles][4], const Shared<T>& columns, int at, int64_t depth,
                              float (&gradient)[kDepth / 8][4]) {
  const int group = thread_index() % 32 / 4, within = thread_index() % 4;
  const int mine = at + 2 * within * kMmaStride<T, kDepth> + group;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint32_t a[4] = {to_tf32(weights[t][0]), to_tf32(weights[t][2]), to_tf32(weights[t][1]),
                           to_tf32(weights[t][3])};
#pragma unroll
    for (int d = 0; d < kDepth; d += 8) {
      if (d % kMmaStep<T> == 0 && d >= depth) break;
      uint32_t b[2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        b[c] = to_tf32(finite<kFinite>(columns.load(mine + (8 * t + c) * kMmaStride<T, kDepth> + d)));
      mma_tf32(gradient[d / 8], a, b);
    }
  }
}

// Streams tiles first_tile to last_tile of the columns past the block's rows. load_side(first column) reads what
// belongs to the columns of the next tile while this one is worked on, store_side(loaded, side) puts it into shared
// memory, and work(first column, place of the tile in memory.columns, its side) runs where both are there.
template <typename T, int kDepth, bool kHeld, typename Load, typename Store, typename Work>
PGLCL_DEVICE void stream_tiles(const MmaMemory<T, kDepth, kHeld>& memory, RowFragments<T, kDepth, kHeld>& fragments,
                               Global<const T> rows, int64_t first_row, int64_t row_count, Global<const T> columns,
                               int64_t column_count, int64_t first_tile, int64_t last_tile, int64_t depth, int stages,
                               Load load_side, Store store_side, Work work) {
  constexpr int kColumns = kMmaColumns<kDepth, kHeld>, kTileSize = MmaMemory<T, kDepth, kHeld>::kTileSize;
  constexpr int kStride = kMmaStride<T, kDepth>;
  if (first_tile >= last_tile) return;
  const CopyPlan plan(int((depth + kMmaStep<T> - 1) / kMmaStep<T> * 4));
  const auto copy_tile = [&](int64_t tile, int stage) {
    copy_rows<T>(plan, memory.columns, stage * kTileSize, kStride, columns, tile * kColumns, kColumns, column_count,
                 depth);
    commit_copies();
  };
  // Rows that are held in registers pass through the memory of the last stage.
  const int rows_at = kHeld ? (stages - 1) * kTileSize : 0;
  const Shared<T>& rows_in = kHeld ? memory.columns : memory.rows;
  copy_rows<T>(plan, rows_in, rows_at, kStride, rows, first_row, kMmaRows, row_count, depth);
  commit_copies();
  if (stages == 2) copy_tile(first_tile, 0);
  store_side(load_side(first_tile * kColumns), memory.side.of_turn(0));
  wait_copies<0>();
  sync_threads();
  fragments.load(rows_in, rows_at, depth);
  if (stages == 1) {
    sync_threads();
    copy_tile(first_tile, 0);
  }
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int turn = int((tile - first_tile) % 2), stage = stages == 2 ? turn : 0;
    const bool more = tile + 1 < last_tile;
    wait_copies<0>();
    sync_threads();  // this tile is there, and nobody reads the one before
    if (stages == 2 && more) copy_tile(tile + 1, 1 - stage);
    const auto next = load_side(more ? (tile + 1) * kColumns : column_count);
    work(tile * kColumns, stage * kTileSize, memory.side.of_turn(turn));
    if (more) store_side(next, memory.side.of_turn(1 - turn));
    if (stages == 1 && more) {
      sync_threads();
      copy_tile(tile + 1, 0);
    }
  }
}

// Step 2 of the forward pass for the two rows of a thread.
template <typename T, bool kHeld, bool kGeneral, bool kSelf, int kTiles>
PGLCL_DEVICE void sum_pairs(const ContrastArguments<T>& x, const ColumnSide<8 * kTiles, 2>& side,
                            const int64_t (&index)[2], const CodedPatch (&anchor)[2],
                            const AnchorTerms<float> (&terms)[2], int64_t first, const float (&products)[kTiles][4],
                            RunningSums<float> (&sums)[2]) {
  constexpr int kColumns = 8 * kTiles;
  const int within = thread_index() % 4;
  float logits[2][2 * kTiles];
  uint32_t positive[2] = {0, 0}, negative[2] = {0, 0};
  int self[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) self[r] = kSelf ? own_column(index[r], x.self_offset, first, kColumns) : -1;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    CodedPatch keys[2];
    side.template patches<2, kGeneral>(8 * t + 2 * within, keys);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * t + 2 * within + c;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        PairKind kind;
        if constexpr (kGeneral) {
          kind = pair_kind(x, index[r], anchor[r], first + column, keys[c], terms[r]);
          sums[r].undecided = sums[r].undecided || kind.undecided;
        } else {
          kind = pair_kind_by_rule(anchor[r], keys[c], terms[r].positive_bound, terms[r].negative_bound);
          if (kSelf && column == self[r]) kind = {false, false, false};
        }
        const float logit = pair_logit(x, products[t][2 * r + c]);
        logits[r][2 * t + c] = kind.positive || kind.negative ? logit : kLowest<float>;
        positive[r] |= uint32_t(kind.positive) << (2 * t + c);
        negative[r] |= uint32_t(kind.negative) << (2 * t + c);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sums[r].add(logits[r], positive[r], kGeneral ? negative[r] : ~positive[r]);
}

// kGeneral: masks or several channels decide, instead of pair_kind_by_rule.
template <typename T, int kDepth, bool kGeneral>
PGLCL_KERNEL contrast_forward_mma(ContrastArguments<T> x, ContrastSums<float> out, ContrastParts parts, int stages) {
  constexpr bool kHeld = kHeldForward<T, kDepth>;
  constexpr int kColumns = kMmaColumns<kDepth, kHeld>, kTiles = kColumns / 8;
  SharedMemory shared;
  const MmaMemory<T, kDepth, kHeld> memory(shared, stages);
  const int64_t first_row = int64_t(block_index()) * kMmaRows;
  const int lane = thread_index() % 32;
  int64_t index[2];
  CodedPatch anchor[2];
  AnchorTerms<float> terms[2];
  RunningSums<float> sums[2];
  const LabelCodes codes(x.labels, first_row, kMmaRows, x.n);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    index[r] = first_row + thread_index() / 32 * 16 + lane / 4 + 8 * r;
    anchor[r] = codes.of(load_patch(x, index[r], true));
    terms[r] = load_terms<T>(x, index[r], anchor[r]);
  }
  KeyScan<float> scan;
  RowFragments<T, kDepth, kHeld> fragments(memory.rows);
  const int64_t tiles = (x.m + kColumns - 1) / kColumns, share = (tiles + parts.count - 1) / parts.count;
  const int64_t first_tile = block_index_y() * share, end = first_tile + share;
  const int64_t last_tile = end < tiles ? end : tiles;
  stream_tiles<T, kDepth, kHeld>(
      memory, fragments, x.anchors, first_row, x.n, x.keys, x.m, first_tile, last_tile, x.depth, stages,
      [&](int64_t first) {
        return codes.of(load_patch(x, thread_index() < kColumns ? first + thread_index() : x.m, false));
      },
      [&](const CodedPatch& patch, const MmaSide<kDepth, kHeld>& side) {
        if (thread_index() >= kColumns) return;
        scan.add(patch);
        side.store(thread_index(), patch);
      },
      [&](int64_t first, int at, const MmaSide<kDepth, kHeld>& side) {
        float products[kTiles][4];
        multiply_rows<T, kDepth, kHeld>(fragments, memory.columns, at, x.depth, products);
        const int64_t self = first_row + x.self_offset;
        if (!kGeneral && x.self_offset >= 0 && first < self + kMmaRows && first + kColumns > self)
          sum_pairs<T, kHeld, kGeneral, true>(x, side, index, anchor, terms, first, products, sums);
        else
          sum_pairs<T, kHeld, kGeneral, false>(x, side, index, anchor, terms, first, products, sums);
      });
  const KeyScan<float> keys = memory.scan.merged(scan);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums[r].merge(1);
    sums[r].merge(2);
    if constexpr (!kGeneral)
      sums[r].undecided =
          keys.undecided(anchor[r], terms[r], is_its_own_key(x, index[r], first_tile * kColumns, last_tile * kColumns));
    if (lane % 4 != 0 || index[r] >= x.n) continue;
    if (parts.count > 1)
      parts.store(block_index_y(), index[r], sums[r]);
    else
      sums[r].write(index[r], x.log_weight, out);
  }
}

// Whether one of a thread's weights is neither 0 nor -0.
template <int kTiles>
PGLCL_DEVICE bool any_weight(const float (&weights)[kTiles][4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= float_bits(weights[t][i]);
  return bits << 1 != 0;
}

// Whose gradient a block of rows holds.
enum class Owner { kAnchors, kKeys, kBoth };

// Step 2 of the backward pass for the two rows of a thread: products become weights. Returns 0, or NaN where a product
// was not finite.
template <typename T, Owner kOwner, bool kGeneral, bool kSelf, int kTiles>
PGLCL_DEVICE float weigh_columns(const ContrastArguments<T>& x, const ColumnSide<8 * kTiles, 2>& side,
                                 const int64_t (&index)[2], const CodedPatch (&own)[2],
                                 const AnchorTerms<float> (&own_terms)[2], int64_t first,
                                 float (&products)[kTiles][4]) {
  constexpr bool kOwnAnchor = kOwner != Owner::kKeys, kOwnKey = kOwner != Owner::kAnchors;
  const int within = thread_index() % 4;
  int self[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    self[r] = kSelf ? own_column(index[r], kOwnAnchor ? x.self_offset : -x.self_offset, first, 8 * kTiles) : -1;
  float infinite = 0;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    CodedPatch others[2];
    AnchorTerms<float> terms[2];
    side.template patches<2, kGeneral>(8 * t + 2 * within, others);
    if constexpr (kOwnKey) side.template terms<2, kGeneral>(8 * t + 2 * within, terms);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * t + 2 * within + c;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float dot = products[t][2 * r + c];
        infinite = multiply_add(dot, 0.0f, infinite);
        float weight = 0;
        if constexpr (kOwnAnchor) {
          PairKind kind;
          if constexpr (kGeneral)
            kind = pair_kind(x, index[r], own[r], first + column, others[c], own_terms[r]);
          else
            kind = pair_kind_by_rule(own[r], others[c], own_terms[r].positive_bound, own_terms[r].negative_bound);
          weight = pair_weight(x, kind, own_terms[r], dot);
        }
        if constexpr (kOwnKey) {
          PairKind kind;
          if constexpr (kGeneral)
            kind = pair_kind(x, first + column, others[c], index[r], own[r], terms[c]);
          else
            kind = pair_kind_by_rule(others[c], own[r], terms[c].positive_bound, terms[c].negative_bound);
          weight += pair_weight(x, kind, terms[c], dot);
        }
        products[t][2 * r + c] = kSelf && column == self[r] ? 0.0f : weight;
      }
    }
  }
  return infinite;
}

// Whether blocks may share the columns. Deep rows leave no registers for it.
template <int kDepth>
constexpr bool kSharesColumns = kDepth <= 128;

template <typename T, int kDepth, Owner kOwner, bool kGeneral>
PGLCL_KERNEL contrast_backward_mma(ContrastArguments<T> x, ContrastGradients<float> g, GradientParts<T> out,
                                   int stages) {
  constexpr int kColumns = kMmaColumns<kDepth, false>, kTiles = kColumns / 8;
  constexpr bool kOwnAnchor = kOwner != Owner::kKeys, kOwnKey = kOwner != Owner::kAnchors;
  SharedMemory shared;
  const MmaMemory<T, kDepth, false> memory(shared, stages);
  const int64_t first_row = int64_t(block_index()) * kMmaRows;
  const int64_t row_count = kOwnAnchor ? x.n : x.m, column_count = kOwnAnchor ? x.m : x.n;
  const int lane = thread_index() % 32;
  memory.scale.find(x, g);
  const LabelCodes codes(kOwnAnchor ? x.labels : x.key_labels, first_row, kMmaRows, row_count);
  int64_t index[2];
  CodedPatch own[2];
  AnchorTerms<float> own_terms[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    index[r] = first_row + thread_index() / 32 * 16 + lane / 4 + 8 * r;
    own[r] = codes.of(load_patch(x, index[r], kOwnAnchor));
    own_terms[r] = kOwnAnchor ? load_terms<T>(x, g, memory.scale.root(), index[r], own[r]) : no_terms<T>();
  }
  float gradient[kDepth / 8][4];
#pragma unroll
  for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) gradient[n][i] = 0;

  struct Loaded {
    CodedPatch patch;
    AnchorTerms<float> terms;
  };
  RowFragments<T, kDepth, false> fragments(memory.rows);
  const int64_t tiles = (column_count + kColumns - 1) / kColumns;
  int64_t first_tile = 0, last_tile = tiles;
  if constexpr (kSharesColumns<kDepth>) {
    const int64_t share = (tiles + out.count - 1) / out.count;
    first_tile = block_index_y() * share;
    last_tile = first_tile + share < tiles ? first_tile + share : tiles;
  }
  stream_tiles<T, kDepth, false>(
      memory, fragments, kOwnAnchor ? x.anchors : x.keys, first_row, row_count, kOwnAnchor ? x.keys : x.anchors,
      column_count, first_tile, last_tile, x.depth, stages,
      [&](int64_t first) {
        const int64_t i = thread_index() < kColumns ? first + thread_index() : column_count;
        Loaded loaded{codes.of(load_patch(x, i, !kOwnAnchor)), no_terms<T>()};
        if constexpr (kOwnKey) loaded.terms = load_terms<T>(x, g, memory.scale.root(), i, loaded.patch);
        return loaded;
      },
      [&](const Loaded& loaded, const MmaSide<kDepth, false>& side) {
        if (thread_index() >= kColumns) return;
        if constexpr (kOwnKey)
          side.store(thread_index(), loaded.patch, loaded.terms);
        else
          side.store(thread_index(), loaded.patch);
      },
      [&](int64_t first, int at, const MmaSide<kDepth, false>& side) {
        float weights[kTiles][4];
        multiply_rows<T, kDepth, false>(fragments, memory.columns, at, x.depth, weights);
        const int64_t self = first_row + (kOwnAnchor ? x.self_offset : -x.self_offset);
        float infinite;
        if (!kGeneral && x.self_offset >= 0 && first < self + kMmaRows && first + kColumns > self)
          infinite = weigh_columns<T, kOwner, kGeneral, true>(x, side, index, own, own_terms, first, weights);
        else
          infinite = weigh_columns<T, kOwner, kGeneral, false>(x, side, index, own, own_terms, first, weights);
        if (ballot(any_weight(weights)) == 0) return;  // the tile adds nothing
        // A column that is not finite has no finite product with any row: every warp sees it.
        if (ballot(infinite != 0) == 0)
          add_columns<T, kDepth, true>(weights, memory.columns, at, x.depth, gradient);
        else
          add_columns<T, kDepth, false>(weights, memory.columns, at, x.depth, gradient);
      });

  const bool in_parts = kSharesColumns<kDepth> && out.count > 1;
  const float inverse_root = in_parts ? 1 : memory.scale.inverse_root();
  const Global<T> grad(out.gradient);
  const Global<float> sums(out.sums);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (index[r] >= row_count) continue;
    // If the loss of an anchor is NaN, so is its gradient.
    const float none = own_terms[r].log_sum != own_terms[r].log_sum ? NAN : 0.0f;
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n) {
      const int d = 8 * n + lane % 4 * 2;
      if (d >= x.depth) break;
      const int64_t at = index[r] * x.depth + d;
      const Vector<float, 2> value{{times_square(gradient[n][2 * r], inverse_root) + none,
                                    times_square(gradient[n][2 * r + 1], inverse_root) + none}};
      if (in_parts)
        sums.template store_vector<2>(block_index_y() * out.size + at, value);
      else
        grad.template store_vector<2>(at, {{narrow<T>(value.at[0]), narrow<T>(value.at[1])}});
    }
  }
}

}  // namespace pglcl::cuda
