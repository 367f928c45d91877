// Arithmetic of one tile of the fused contrastive loss (method, section 5), compiled once per instruction set.
//
// A tile is computed panel by panel. First come the products of its anchors with one panel of keys (matrix
// micro-kernel). While the panel lies in the first-level cache, masks and exponentials follow, and from them sums
// (forward) or dL/ds (backward). The backward pass ends with two matrix products, from dL/ds to anchors and to keys.
#include "contrast_tile.h"

#include "kernel_table.h"
#include "tile_gemm.h"

namespace pglcl::PGLCL_ISA {
namespace {

enum class Pass { kMaximum, kSum, kGradient };

// Bits of ContrastScratch::codes.
enum : int { kRowPositive = 1, kRowNegative = 2, kColumnPositive = 4, kColumnNegative = 8 };

// Partial sums of the rows, one vector per row and kind, in ContrastScratch::row_sums. Those of a kind lie together,
// since few tiles need all four kinds. A power of two between the kinds would put a row's sums into one set of a cache.
enum : int { kPositiveExp = 0, kNegativeExp = 1, kPositiveLogit = 2, kPositiveCount = 3, kRowSums = 4 };
template <typename scalar_t>
constexpr int64_t kRowSumStride = kRowSumRows * Simd<scalar_t>::kLanes;

template <typename scalar_t>
void panel_dots(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key, scalar_t* dots) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(scalar_t) == 4)
    if (t.keys.depth_pair_panels)
      return tile_gemm<Bfloat16Pair, false>(
          at.rows, kPanel, t.depth_pairs, t.anchors.depth_pairs + at.row * t.depth_pairs, t.depth_pairs, 1,
          t.keys.depth_pair_panels + key * t.depth_pairs, kPanel, {dots, kPanel, nullptr});
#endif
  tile_gemm<scalar_t, false>(at.rows, kPanel, t.depth, t.anchors.rows + at.row * t.anchors.row_stride,
                             t.anchors.row_stride, 1, t.keys.panels + key * t.depth, kPanel, {dots, kPanel, nullptr});
}

// Disparities of several channels, computed in sum_t.
template <typename sum_t, typename scalar_t>
void panel_disparity(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key, scalar_t* disparity) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  const sum_t channels = sum_t(t.channels);
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t c = 0; c < kPanel; ++c) {
      sum_t sum = 0;
      for (int64_t k = 0; k < t.channels; ++k) {
        const sum_t d = sum_t(t.anchors.descriptor[k * t.anchors.padded + at.row + r]) -
                        sum_t(t.keys.descriptor[k * t.keys.padded + key + c]);
        sum += d < 0 ? -d : d;
      }
      disparity[r * kPanel + c] = sum / channels;
    }
  }
}

// Whether an anchor has a gradient; in the forward pass, every anchor counts.
template <typename scalar_t>
PGLCL_INLINE bool counts(const ContrastState<scalar_t>& state, int64_t anchor) {
  return !state.mean_coefficient || state.mean_coefficient[anchor] != 0;
}

template <typename scalar_t>
void panel_codes(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key, bool columns,
                 integer_t<scalar_t>* codes) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  const ContrastMasks& m = t.masks;
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = t.anchors.index[at.row + r];
    const bool row_counts = counts(t.state, at.row + r);
    for (int64_t c = 0; c < kPanel; ++c) {
      int code = 0;
      if (key + c < t.keys.count && t.anchors.identity[at.row + r] != t.keys.identity[key + c]) {
        const int64_t j = t.keys.index[key + c];
        code |= row_counts && m.positive[i * m.positive_stride[0] + j * m.positive_stride[1]] ? kRowPositive : 0;
        code |= row_counts && m.negative[i * m.negative_stride[0] + j * m.negative_stride[1]] ? kRowNegative : 0;
        if (columns && counts(t.state, key + c)) {
          code |= m.positive[j * m.positive_stride[0] + i * m.positive_stride[1]] ? kColumnPositive : 0;
          code |= m.negative[j * m.negative_stride[0] + i * m.negative_stride[1]] ? kColumnNegative : 0;
        }
      }
      codes[r * kPanel + c] = code;
    }
  }
}

// An infinite product becomes NaN, and with it the weight of its pair, if that counts.
template <typename scalar_t>
void spoil_infinite(const TilePosition& at, scalar_t* dots) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  for (int64_t i = 0; i < at.rows * Simd<scalar_t>::kPanel; i += kLanes) {
    const vec_t<scalar_t> dot = load(dots + i);
    store(dots + i, dot + (dot - dot));
  }
}

template <typename scalar_t>
PGLCL_INLINE void accumulate(scalar_t* sums, vec_t<scalar_t> value) {
  store(sums, load(sums) + value);
}

// Adds the lanes of a vector to as many numbers.
template <typename scalar_t>
PGLCL_INLINE void add_lanes(double* sums, vec_t<scalar_t> value) {
  typedef double wide __attribute__((vector_size(8 * Simd<scalar_t>::kLanes), aligned(8)));
  *reinterpret_cast<wide*>(sums) += __builtin_convertvector(value, wide);
}

// The masks, exponentials and sums of a panel. kColumns: the keys are anchors, too, so each pair counts for both.
// kFixed: the exponents have a fixed shift.
template <typename scalar_t, Pass kPass, TileKind kKind, bool kColumns, bool kFixed>
struct ContrastPanel {
  using vec = vec_t<scalar_t>;
  using mask = mask_t<scalar_t>;
  using integer = integer_t<scalar_t>;
  static constexpr int kLanes = Simd<scalar_t>::kLanes;
  static constexpr int kPanel = Simd<scalar_t>::kPanel;
  static constexpr bool kPositives = kKind != TileKind::kDifferent;
  static constexpr bool kNegatives = kKind != TileKind::kSame;
  static constexpr scalar_t kUnit = kFixed ? 1 : scalar_t(kLogitUnit);

  // Numbers of the tile. They are copied, since for all the compiler knows the panel's stores change the tile.
  struct Constants {
    const vec scale, shift;
    const scalar_t log_weight;
    const bool several_channels;

    PGLCL_INLINE explicit Constants(const ContrastTile<scalar_t>& t)
        : scale(broadcast<scalar_t>(t.scale)),
          shift(broadcast<scalar_t>(t.shift)),
          log_weight(t.log_negative_weight),
          several_channels(t.channels > 1) {}
  };

  // A vector of keys, with what they have as anchors.
  struct Columns {
    mask label, identity;
    vec descriptor;
    vec positive_bound{}, negative_bound{}, max_logit{};
    vec positive_coefficient{}, negative_coefficient{}, mean_coefficient{};
    vec sums[kRowSums] = {}, maximum{};
  };

  // Which of the pairs (row, vector of keys) count with the row as anchor, and with the keys as anchors.
  struct Masks {
    mask row_positive{}, row_negative{}, column_positive{}, column_negative{};
  };

  // Exponentials of the pairs as each side needs them. Logits of positives are less that side's maximum, or dots where
  // the shift is fixed.
  struct Terms {
    vec row_positive_exp, row_negative_exp, column_positive_exp, column_negative_exp;
    vec row_positive_logit, column_positive_logit;
  };

  static PGLCL_INLINE void load_columns(const ContrastTile<scalar_t>& t, int64_t key, Columns& columns) {
    const ContrastState<scalar_t>& state = t.state;
    columns.label = load_integers<scalar_t>(t.keys.label + key);
    columns.identity = load_integers<scalar_t>(t.keys.identity + key);
    columns.descriptor = load(t.keys.descriptor + key);
    if constexpr (!kColumns) return;
    columns.positive_bound = load(state.positive_bound + key);
    columns.negative_bound = load(state.negative_bound + key);
    if constexpr (!kFixed) columns.maximum = columns.max_logit = load(state.max_logit + key);
    if constexpr (kPass == Pass::kGradient) {
      columns.positive_coefficient = load(state.positive_coefficient + key);
      columns.negative_coefficient = load(state.negative_coefficient + key);
      columns.mean_coefficient = load(state.mean_coefficient + key);
    }
  }

  // offset: of the pairs in the panel.
  static PGLCL_INLINE Masks pair_masks(const ContrastTile<scalar_t>& t, const Constants& constants,
                                       const ContrastScratch<scalar_t>& scratch, const Columns& columns, int64_t i,
                                       int64_t offset) {
    Masks pairs;
    if constexpr (kKind == TileKind::kMasked) {
      const mask code = load_integers<scalar_t>(scratch.codes + offset);
      pairs.row_positive = (code & integer(kRowPositive)) != 0;
      pairs.row_negative = (code & integer(kRowNegative)) != 0;
      pairs.column_positive = (code & integer(kColumnPositive)) != 0;
      pairs.column_negative = (code & integer(kColumnNegative)) != 0;
      return pairs;
    }
    vec delta = constants.several_channels ? load(scratch.disparity + offset)
                                           : absolute<scalar_t>(t.anchors.descriptor[i] - columns.descriptor);
    if (sizeof(scalar_t) == 8 && t.float32_disparity) delta = as_float32(delta);
    pairs.row_positive = delta <= t.state.positive_bound[i];
    pairs.row_negative = delta >= t.state.negative_bound[i];
    pairs.column_positive = delta <= columns.positive_bound;
    pairs.column_negative = delta >= columns.negative_bound;
    if constexpr (kKind == TileKind::kMixed) {
      // Only the padding has a negative rank, -1, with which the exclusive or is negative or zero.
      const integer label = t.anchors.label[i];
      const mask other = columns.identity != t.anchors.identity[i];
      const mask same = (columns.label == label) & other;
      const mask different = ((columns.label ^ label) > 0) & other;
      pairs.row_positive &= same;
      pairs.row_negative &= different;
      pairs.column_positive &= same;
      pairs.column_negative &= different;
    }
    return pairs;
  }

  static PGLCL_INLINE void raise_maxima(const ContrastTile<scalar_t>& t, const Constants& constants, const Masks& pairs,
                                        vec dot, scalar_t* sums, Columns& columns) {
    const vec lowest = broadcast<scalar_t>(scalar_t(-__builtin_inf()));
    const vec logit = rounded(dot * t.inverse_temperature);
    vec row_maximum = load(sums);
    if constexpr (kPositives) {
      row_maximum = maximum<scalar_t>(row_maximum, pairs.row_positive ? logit : lowest);
      columns.maximum = maximum<scalar_t>(columns.maximum, pairs.column_positive ? logit : lowest);
    }
    if constexpr (kNegatives) {
      const vec weighted = logit + constants.log_weight;
      row_maximum = maximum<scalar_t>(row_maximum, pairs.row_negative ? weighted : lowest);
      columns.maximum = maximum<scalar_t>(columns.maximum, pairs.column_negative ? weighted : lowest);
    }
    store(sums, row_maximum);
  }

  // Without a fixed shift, every pass rounds a logit before it subtracts the maximum. So no difference is above 0, and
  // that of the maximum is 0.
  static PGLCL_INLINE Terms pair_terms(const ContrastTile<scalar_t>& t, const Constants& constants,
                                       const Columns& columns, int64_t i, vec dot) {
    Terms terms;
    if constexpr (kFixed) {
      terms.row_positive_logit = terms.column_positive_logit = dot;
      terms.row_positive_exp = exp2(dot * constants.scale - constants.shift);
      terms.row_negative_exp = terms.column_positive_exp = terms.column_negative_exp = terms.row_positive_exp;
    } else {
      const vec logit = rounded(dot * t.inverse_temperature);
      const vec weighted = logit + constants.log_weight;
      const scalar_t row_max_logit = t.state.max_logit[i];
      terms.row_positive_logit = logit - row_max_logit;
      terms.column_positive_logit = logit - columns.max_logit;
      if constexpr (kPositives) terms.row_positive_exp = exp_of_nonpositive<scalar_t>(terms.row_positive_logit);
      if constexpr (kNegatives) terms.row_negative_exp = exp_of_nonpositive<scalar_t>(weighted - row_max_logit);
      if constexpr (kColumns && kPositives)
        terms.column_positive_exp = exp_of_nonpositive<scalar_t>(terms.column_positive_logit);
      if constexpr (kColumns && kNegatives)
        terms.column_negative_exp = exp_of_nonpositive<scalar_t>(weighted - columns.max_logit);
    }
    return terms;
  }

  static PGLCL_INLINE void add_sums(const Masks& pairs, const Terms& terms, scalar_t* sums, Columns& columns) {
    constexpr int64_t kStride = kRowSumStride<scalar_t>;
    const vec one = broadcast<scalar_t>(1);
    if constexpr (kPositives) {
      accumulate(sums + kPositiveExp * kStride, keep<scalar_t>(pairs.row_positive, terms.row_positive_exp));
      accumulate(sums + kPositiveLogit * kStride, keep<scalar_t>(pairs.row_positive, terms.row_positive_logit) * kUnit);
      accumulate(sums + kPositiveCount * kStride, keep<scalar_t>(pairs.row_positive, one));
      if constexpr (kColumns) {
        columns.sums[kPositiveExp] += keep<scalar_t>(pairs.column_positive, terms.column_positive_exp);
        columns.sums[kPositiveLogit] += keep<scalar_t>(pairs.column_positive, terms.column_positive_logit) * kUnit;
        columns.sums[kPositiveCount] += keep<scalar_t>(pairs.column_positive, one);
      }
    }
    if constexpr (kNegatives) {
      accumulate(sums + kNegativeExp * kStride, keep<scalar_t>(pairs.row_negative, terms.row_negative_exp));
      if constexpr (kColumns)
        columns.sums[kNegativeExp] += keep<scalar_t>(pairs.column_negative, terms.column_negative_exp);
    }
  }

  // dL/d(dot).
  static PGLCL_INLINE vec pair_weights(const ContrastState<scalar_t>& state, const Masks& pairs, const Terms& terms,
                                       const Columns& columns, int64_t i) {
    vec weight{};
    if constexpr (kPositives) {
      weight += keep<scalar_t>(pairs.row_positive,
                               terms.row_positive_exp * state.positive_coefficient[i] - state.mean_coefficient[i]);
      if constexpr (kColumns)
        weight += keep<scalar_t>(pairs.column_positive,
                                 terms.column_positive_exp * columns.positive_coefficient - columns.mean_coefficient);
    }
    if constexpr (kNegatives) {
      weight += keep<scalar_t>(pairs.row_negative, terms.row_negative_exp * state.negative_coefficient[i]);
      if constexpr (kColumns)
        weight += keep<scalar_t>(pairs.column_negative, terms.column_negative_exp * columns.negative_coefficient);
    }
    return weight;
  }

  static PGLCL_INLINE void store_columns(const ContrastState<scalar_t>& state, int64_t key, const Columns& columns) {
    if constexpr (kPass == Pass::kMaximum && kColumns) store(state.max_logit + key, columns.maximum);
    if constexpr (kPass == Pass::kSum && kColumns) {
      if constexpr (kPositives) {
        add_lanes<scalar_t>(state.positive_exp + key, columns.sums[kPositiveExp]);
        add_lanes<scalar_t>(state.positive_logit + key, columns.sums[kPositiveLogit]);
        add_lanes<scalar_t>(state.positive_count + key, columns.sums[kPositiveCount]);
      }
      if constexpr (kNegatives) add_lanes<scalar_t>(state.negative_exp + key, columns.sums[kNegativeExp]);
    }
  }

  static void compute(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key0,
                      const ContrastScratch<scalar_t>& scratch) {
    const Constants constants(t);
    for (int half = 0; half < 2; ++half) {
      const int64_t key = key0 + half * kLanes;
      Columns columns;
      load_columns(t, key, columns);
      for (int64_t r = 0; r < at.rows; ++r) {
        const int64_t i = at.row + r, offset = r * kPanel + half * kLanes;
        const vec dot = load(scratch.dots + offset);
        scalar_t* sums = scratch.row_sums + r * kLanes;
        const Masks pairs = pair_masks(t, constants, scratch, columns, i, offset);
        if constexpr (kPass == Pass::kMaximum) {
          raise_maxima(t, constants, pairs, dot, sums, columns);
        } else {
          const Terms terms = pair_terms(t, constants, columns, i, dot);
          if constexpr (kPass == Pass::kSum)
            add_sums(pairs, terms, sums, columns);
          else
            store(scratch.weights + r * kWeightStride<scalar_t> + (key - at.column),
                  pair_weights(t.state, pairs, terms, columns, i));
        }
      }
      store_columns(t.state, key, columns);
    }
  }
};

template <typename scalar_t>
void begin_rows(const TilePosition& at, const ContrastScratch<scalar_t>& scratch, scalar_t value) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  for (int sum = 0; sum < kRowSums; ++sum)
    for (int64_t r = 0; r < at.rows; ++r)
      store(scratch.row_sums + sum * kRowSumStride<scalar_t> + r * kLanes, broadcast<scalar_t>(value));
}

template <typename scalar_t, Pass kPass>
void end_rows(const ContrastTile<scalar_t>& t, const TilePosition& at, const ContrastScratch<scalar_t>& scratch) {
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  for (int64_t r = 0; r < at.rows; ++r) {
    const scalar_t* sums = scratch.row_sums + r * kLanes;
    const int64_t i = at.row + r;
    if constexpr (kPass == Pass::kMaximum) {
      const scalar_t value = horizontal_max<scalar_t>(load(sums));
      if (value > t.state.max_logit[i]) t.state.max_logit[i] = value;
    } else {
      if (at.kind != TileKind::kDifferent) {
        t.state.positive_exp[i] += horizontal_sum<scalar_t>(load(sums + kPositiveExp * kRowSumStride<scalar_t>));
        t.state.positive_logit[i] += horizontal_sum<scalar_t>(load(sums + kPositiveLogit * kRowSumStride<scalar_t>));
        t.state.positive_count[i] += horizontal_sum<scalar_t>(load(sums + kPositiveCount * kRowSumStride<scalar_t>));
      }
      if (at.kind != TileKind::kSame)
        t.state.negative_exp[i] += horizontal_sum<scalar_t>(load(sums + kNegativeExp * kRowSumStride<scalar_t>));
    }
  }
}

template <typename scalar_t>
using PanelFunction = void (*)(const ContrastTile<scalar_t>&, const TilePosition&, int64_t,
                               const ContrastScratch<scalar_t>&);

template <typename scalar_t, Pass kPass, bool kColumns, bool kFixed>
PanelFunction<scalar_t> panel_of_kind(TileKind kind) {
  switch (kind) {
    case TileKind::kSame: return ContrastPanel<scalar_t, kPass, TileKind::kSame, kColumns, kFixed>::compute;
    case TileKind::kDifferent: return ContrastPanel<scalar_t, kPass, TileKind::kDifferent, kColumns, kFixed>::compute;
    case TileKind::kMixed: return ContrastPanel<scalar_t, kPass, TileKind::kMixed, kColumns, kFixed>::compute;
    default: return ContrastPanel<scalar_t, kPass, TileKind::kMasked, kColumns, kFixed>::compute;
  }
}

template <typename scalar_t, Pass kPass>
PanelFunction<scalar_t> choose_panel(TileKind kind, bool columns, bool fixed) {
  if constexpr (kPass != Pass::kMaximum) {
    if (fixed)
      return columns ? panel_of_kind<scalar_t, kPass, true, true>(kind)
                     : panel_of_kind<scalar_t, kPass, false, true>(kind);
  }
  return columns ? panel_of_kind<scalar_t, kPass, true, false>(kind)
                 : panel_of_kind<scalar_t, kPass, false, false>(kind);
}

// Rows [first, first + rows) of a tile, with one panel of its keys.
template <typename scalar_t>
void run_rows(PanelFunction<scalar_t> compute, const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key,
              const ContrastScratch<scalar_t>& scratch, int64_t first, int64_t rows) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  if (rows <= 0) return;
  TilePosition part = at;
  part.row += first;
  part.rows = rows;
  ContrastScratch<scalar_t> own = scratch;
  own.dots += first * kPanel;
  own.disparity += first * kPanel;
  own.row_sums += first * Simd<scalar_t>::kLanes;
  own.weights += first * kWeightStride<scalar_t>;
  compute(t, part, key, own);
}

// The index of the first anchor whose label is at least `label`. Anchors are sorted by label.
template <typename scalar_t>
int64_t first_of_label(const integer_t<scalar_t>* labels, int64_t rows, integer_t<scalar_t> label) {
  int64_t first = 0;
  while (rows > 0) {
    const int64_t half = rows / 2;
    const bool below = labels[first + half] < label;
    first += below ? half + 1 : 0;
    rows = below ? rows - half - 1 : half;
  }
  return first;
}

// A tile of several labels. If the keys of a panel have one label, the sorted anchors are first of other labels, then
// of this one, then of others again. So labels need no comparison, except where a patch may be a pair of itself.
template <typename scalar_t, Pass kPass>
void run_mixed(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key,
               const ContrastScratch<scalar_t>& scratch, bool columns, bool meets_itself) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  const auto run = [&](TileKind kind, int64_t first, int64_t last) {
    run_rows(choose_panel<scalar_t, kPass>(kind, columns, t.fixed_shift), t, at, key, scratch, first, last - first);
  };
  const integer_t<scalar_t> label = t.keys.label[key];
  if (key + kPanel > t.keys.count || t.keys.label[key + kPanel - 1] != label) return run(TileKind::kMixed, 0, at.rows);
  const integer_t<scalar_t>* labels = t.anchors.label + at.row;
  const int64_t first = first_of_label<scalar_t>(labels, at.rows, label);
  const int64_t last = first + first_of_label<scalar_t>(labels + first, at.rows - first, label + 1);
  // Keys that were given may contain an anchor under another label.
  const TileKind different = t.keys_hold_anchors ? TileKind::kMixed : TileKind::kDifferent;
  run(different, 0, first);
  run(meets_itself ? TileKind::kMixed : TileKind::kSame, first, last);
  run(different, last, at.rows);
}

// Computes rows of a tile with one panel of its keys.
template <typename scalar_t, Pass kPass>
void run_panel(const ContrastTile<scalar_t>& t, const TilePosition& at, int64_t key,
               const ContrastScratch<scalar_t>& scratch, bool columns, bool meets_itself) {
  panel_dots(t, at, key, scratch.dots);
  if (kPass == Pass::kGradient && !t.finite) spoil_infinite(at, scratch.dots);
  if (at.kind == TileKind::kMasked)
    panel_codes(t, at, key, columns, scratch.codes);
  else if (t.channels > 1 && t.float32_disparity)
    panel_disparity<float>(t, at, key, scratch.disparity);
  else if (t.channels > 1)
    panel_disparity<scalar_t>(t, at, key, scratch.disparity);
  if (at.kind == TileKind::kMixed) return run_mixed<scalar_t, kPass>(t, at, key, scratch, columns, meets_itself);
  choose_panel<scalar_t, kPass>(at.kind, columns, t.fixed_shift)(t, at, key, scratch);
}

// A symmetric problem computes each pair of patches once, and counts it for both. For a panel on the diagonal, it
// computes the rows above the panel's own rows, and these rows themselves, in which each pair occurs twice.
template <typename scalar_t, Pass kPass>
void run_panels(const ContrastTile<scalar_t>& t, const TilePosition& at, const ContrastScratch<scalar_t>& scratch) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  for (int64_t column = 0; column < at.columns; column += kPanel) {
    const int64_t key = at.column + column;
    if (!t.symmetric || !at.diagonal) {
      run_panel<scalar_t, kPass>(t, at, key, scratch, t.symmetric, t.keys_hold_anchors);
      continue;
    }
    TilePosition rows = at;
    rows.rows = column;
    if (column > 0) run_panel<scalar_t, kPass>(t, rows, key, scratch, true, false);
    rows.row = at.row + column;
    rows.rows = at.rows - column < kPanel ? at.rows - column : kPanel;
    ContrastScratch<scalar_t> own = scratch;
    own.row_sums += column * Simd<scalar_t>::kLanes;
    own.weights += column * kWeightStride<scalar_t>;
    run_panel<scalar_t, kPass>(t, rows, key, own, kPass == Pass::kGradient, true);
  }
}

template <typename scalar_t>
void tile_maximum(const ContrastTile<scalar_t>& t, const TilePosition& at, const ContrastScratch<scalar_t>& scratch) {
  begin_rows<scalar_t>(at, scratch, scalar_t(-__builtin_inf()));
  run_panels<scalar_t, Pass::kMaximum>(t, at, scratch);
  end_rows<scalar_t, Pass::kMaximum>(t, at, scratch);
}

template <typename scalar_t>
void tile_sum(const ContrastTile<scalar_t>& t, const TilePosition& at, const ContrastScratch<scalar_t>& scratch) {
  begin_rows<scalar_t>(at, scratch, 0);
  run_panels<scalar_t, Pass::kSum>(t, at, scratch);
  end_rows<scalar_t, Pass::kSum>(t, at, scratch);
}

// Copies the weights above the diagonal's panels to those below, which are their mirror image.
template <typename scalar_t>
void mirror_weights(const TilePosition& at, scalar_t* weights) {
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  constexpr int64_t kStride = kWeightStride<scalar_t>;
  for (int64_t row = kPanel; row < at.rows; row += kPanel) {
    const int64_t end = row + kPanel < at.rows ? row + kPanel : at.rows;
    for (int64_t column = 0; column < row; column += kPanel)
      for (int64_t r = row; r < end; ++r)
        for (int64_t c = column; c < column + kPanel; ++c) weights[r * kStride + c] = weights[c * kStride + r];
  }
}

template <typename scalar_t>
RowsOfC<scalar_t> gradient_rows(const ContrastTile<scalar_t>& t, scalar_t* data, const int32_t* index, int64_t row) {
  if (t.grad_indexed) return {data, t.grad_stride, index + row};
  return {data + row * t.grad_stride, t.grad_stride, nullptr};
}

#if defined(__AVX512BF16__)
// Rounds the weights to bfloat16, in pairs of keys and of anchors. A key or an anchor beyond the tile has weight 0.
void round_weights(const TilePosition& at, const ContrastScratch<float>& scratch) {
  constexpr int kLanes = Simd<float>::kLanes;
  constexpr int64_t kStride = kWeightStride<float>;
  // The numbers of two vectors, one of each in turns.
  static const uint16_t turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_turns = _mm512_loadu_si512(turns);
  if (at.rows % 2)
    for (int64_t c = 0; c < at.columns; c += kLanes) store(scratch.weights + at.rows * kStride + c, vec_t<float>{});
  for (int64_t r = 0; r < at.rows; r += 2) {
    const float *even = scratch.weights + r * kStride, *odd = even + kStride;
    for (int64_t c = 0; c < at.columns; c += 2 * kLanes) {
      const __m512 even0 = _mm512_loadu_ps(even + c), even1 = _mm512_loadu_ps(even + c + kLanes);
      const __m512 odd0 = _mm512_loadu_ps(odd + c), odd1 = _mm512_loadu_ps(odd + c + kLanes);
      Bfloat16Pair* keys = scratch.key_pairs + r * kKeyPairStride + c / 2;
      _mm512_storeu_si512(keys, (__m512i)_mm512_cvtne2ps_pbh(even1, even0));
      _mm512_storeu_si512(keys + kKeyPairStride, (__m512i)_mm512_cvtne2ps_pbh(odd1, odd0));
      Bfloat16Pair* anchors = scratch.anchor_pairs + r / 2 * kAnchorPairStride + c;
      const __m512i pairs0 = (__m512i)_mm512_cvtne2ps_pbh(odd0, even0);
      const __m512i pairs1 = (__m512i)_mm512_cvtne2ps_pbh(odd1, even1);
      _mm512_storeu_si512(anchors, _mm512_permutexvar_epi16(in_turns, pairs0));
      _mm512_storeu_si512(anchors + kLanes, _mm512_permutexvar_epi16(in_turns, pairs1));
    }
  }
}

void pair_gradients(const ContrastTile<float>& t, const TilePosition& at, const ContrastScratch<float>& scratch) {
  round_weights(at, scratch);
  if (t.grad_anchors)
    tile_gemm<Bfloat16Pair, true>(at.rows, t.depth, (at.columns + 1) / 2, scratch.key_pairs, kKeyPairStride, 1,
                                  t.keys.patch_pairs + at.column / 2 * t.keys.row_stride, t.keys.row_stride,
                                  gradient_rows(t, t.grad_anchors, t.anchors.index, at.row));
  if (t.grad_keys && !(t.symmetric && at.diagonal))
    tile_gemm<Bfloat16Pair, true>(at.columns, t.depth, (at.rows + 1) / 2, scratch.anchor_pairs, 1, kAnchorPairStride,
                                  t.anchors.patch_pairs + at.row / 2 * t.anchors.row_stride, t.anchors.row_stride,
                                  gradient_rows(t, t.grad_keys, t.keys.index, at.column));
}
#endif

// In the symmetric case, a weight is dL/ds of a pair for both of its anchors, also on the diagonal. So on the diagonal
// the product with the keys is enough.
template <typename scalar_t>
void tile_gradient(const ContrastTile<scalar_t>& t, const TilePosition& at, const ContrastScratch<scalar_t>& scratch) {
  constexpr int64_t kStride = kWeightStride<scalar_t>;
  run_panels<scalar_t, Pass::kGradient>(t, at, scratch);
  if (t.symmetric && at.diagonal) mirror_weights(at, scratch.weights);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(scalar_t) == 4)
    if (t.keys.patch_pairs) return pair_gradients(t, at, scratch);
#endif
  if (t.grad_anchors)
    tile_gemm<scalar_t, true>(at.rows, t.depth, at.columns, scratch.weights, kStride, 1,
                              t.keys.finite_rows + at.column * t.keys.row_stride, t.keys.row_stride,
                              gradient_rows(t, t.grad_anchors, t.anchors.index, at.row));
  if (t.grad_keys && !(t.symmetric && at.diagonal))
    tile_gemm<scalar_t, true>(at.columns, t.depth, at.rows, scratch.weights, 1, kStride,
                              t.anchors.finite_rows + at.row * t.anchors.row_stride, t.anchors.row_stride,
                              gradient_rows(t, t.grad_keys, t.keys.index, at.column));
}

}  // namespace

template <typename scalar_t>
ContrastKernels<scalar_t> contrast_kernels() {
  return {Simd<scalar_t>::kPanel, Simd<scalar_t>::kLanes, tile_maximum<scalar_t>, tile_sum<scalar_t>,
          tile_gradient<scalar_t>};
}

template ContrastKernels<float> contrast_kernels<float>();
template ContrastKernels<double> contrast_kernels<double>();

}  // namespace pglcl::PGLCL_ISA
