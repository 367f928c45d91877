#include "patch_contrast_kernel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "buffer.h"
#include "isa/kernel_table.h"

namespace pglcl {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Exponents in [-2 B, 0] after subtracting the bound B of all logits (Cauchy-Schwarz) need no maximum per anchor while
// 2^-2B is a normal float.
constexpr double kLargestFixedShift = 57.0;

// Of a fixed shift's exponentials: no product with one of them comes near the largest float.
constexpr double kLargestCoefficient = 1e30;

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double kSerialWork = 1 << 21;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Finite numbers in their order, as unsigned integers; NaN sorts somewhere, the same place every time.
uint64_t ordered_bits(double value) {
  uint64_t bits;
  value += 0.0;  // -0 becomes 0
  std::memcpy(&bits, &value, sizeof(bits));
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

// --- Step 1: order the patches that take part by label, then by descriptor -------------------------------------------

struct Patch {
  int64_t label;
  uint64_t descriptor;
  int32_t index;
  bool operator<(const Patch& other) const {
    if (label != other.label) return label < other.label;
    if (descriptor != other.descriptor) return descriptor < other.descriptor;
    return index < other.index;
  }
};

template <typename scalar_t>
std::vector<Patch> sorted_patches(int64_t count, const int64_t* labels, const scalar_t* descriptors, int64_t channels,
                                  int64_t ignore_index, bool sort) {
  std::vector<Patch> patches;
  patches.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (labels[i] != ignore_index)
      patches.push_back({labels[i], descriptors ? ordered_bits(double(descriptors[i * channels])) : 0, int32_t(i)});
  if (sort) std::sort(patches.begin(), patches.end());
  return patches;
}

// Any int64 labels become ranks, so that narrow integers can be compared.
void rank_labels(std::vector<Patch>& a, std::vector<Patch>& b) {
  std::vector<int64_t> distinct;
  for (const std::vector<Patch>* side : {&a, &b}) {
    for (const Patch& p : *side)
      if (distinct.empty() || distinct.back() != p.label) distinct.push_back(p.label);
  }
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (std::vector<Patch>* side : {&a, &b}) {
    int64_t last = 0, rank = -1;
    for (Patch& p : *side) {
      if (rank < 0 || p.label != last) {
        last = p.label;
        rank = std::lower_bound(distinct.begin(), distinct.end(), last) - distinct.begin();
      }
      p.label = rank;
    }
  }
}

// --- Step 2: copy them into that order, padded
// ------------------------------------------------------------------------

template <typename scalar_t>
struct PackedSide {
  ContrastSide<scalar_t> view{};
  Buffer<scalar_t> rows, finite_rows, panels, descriptor;
  Buffer<uint16_t> rows_bf16, panels_bf16;
  Buffer<integer_t<scalar_t>> label, identity;
  Buffer<int32_t> index;
  double longest = 0;  // largest norm of a row; NaN or infinite when an element is

  void arrange(const std::vector<Patch>& patches, const scalar_t* descriptors, int64_t channels,
               int64_t identity_offset) {
    const int64_t count = patches.size();
    view.count = count;
    view.padded = round_up(count, kTile);
    index = Buffer<int32_t>(std::max<int64_t>(count, 1));
    label = Buffer<integer_t<scalar_t>>(view.padded, -1);
    identity = Buffer<integer_t<scalar_t>>(view.padded, -1);
    descriptor = Buffer<scalar_t>(channels * view.padded, 0);
    for (int64_t i = 0; i < count; ++i) {
      index[i] = patches[i].index;
      label[i] = integer_t<scalar_t>(patches[i].label);
      identity[i] = integer_t<scalar_t>(identity_offset == kNoIdentity ? -2 : patches[i].index + identity_offset);
      for (int64_t c = 0; descriptors && c < channels; ++c)
        descriptor[c * view.padded + i] = descriptors[patches[i].index * channels + c];
    }
    view.index = index.data();
    view.label = label.data();
    view.identity = identity.data();
    view.descriptor = descriptor.data();
  }

  static constexpr int64_t kNoIdentity = std::numeric_limits<int64_t>::min();

  void pack(const Matrix& source, int64_t depth, bool as_keys, const KernelTable& table, int workers,
            const Parallel& parallel) {
    const int panel = table.contrast<scalar_t>().panel;
    const bool bf16 = sizeof(scalar_t) == 4 && table.bf16_products && source.dtype == DType::kBFloat16;
    const int64_t depth_bf16 = round_up(depth, 2);
    // An odd number of cache lines per row: the rows of a tile then spread over all sets of a cache. The last
    // kPanel-wide read of a row may pass its end.
    const int64_t line = 64 / sizeof(scalar_t);
    const int64_t stride = round_up(depth, line) + (round_up(depth, line) / line % 2 ? 0 : line);
    view.row_stride = stride;
    rows = Buffer<scalar_t>(view.padded * stride + panel);
    view.rows = rows.data();
    if (as_keys && !bf16) {
      panels = Buffer<scalar_t>(view.padded * depth);
      view.panels = panels.data();
    }
    if (bf16) {
      rows_bf16 = Buffer<uint16_t>(view.padded * depth_bf16);
      view.rows_bf16 = rows_bf16.data();
      if (as_keys) {
        panels_bf16 = Buffer<uint16_t>(view.padded * depth_bf16);
        view.panels_bf16 = panels_bf16.data();
      }
    }
    std::fill(rows.data() + view.padded * stride, rows.data() + rows.size(), scalar_t(0));

    const int64_t blocks = view.padded / panel;
    std::vector<double> longest_of(workers, 0.0);
    parallel.run(workers, [&](int worker) {
      const Share share(blocks, workers, worker);
      double longest_square = 0;
      for (int64_t block = share.first; block < share.last; ++block) {
        for (int64_t i = block * panel; i < (block + 1) * panel; ++i) {
          scalar_t* row = rows.data() + i * stride;
          uint16_t* low = bf16 ? rows_bf16.data() + i * depth_bf16 : nullptr;
          if (low) std::fill(low, low + depth_bf16, uint16_t(0));
          int64_t filled = 0;
          if (i < view.count) {
            const int64_t first = index[i] * depth;
            read_elements(source.data, source.dtype, first, depth, row);
            if (low) std::memcpy(low, static_cast<const uint16_t*>(source.data) + first, depth * sizeof(uint16_t));
            filled = depth;
            scalar_t lanes[16] = {};
            int64_t d = 0;
            for (; d + 16 <= depth; d += 16)
              for (int l = 0; l < 16; ++l) lanes[l] += row[d + l] * row[d + l];
            for (; d < depth; ++d) lanes[0] += row[d] * row[d];
            double square = 0;
            for (int l = 0; l < 16; ++l) square += double(lanes[l]);
            if (!(square <= longest_square)) longest_square = std::isnan(longest_square) ? longest_square : square;
          }
          std::fill(row + filled, row + stride, scalar_t(0));
        }
        if (view.panels) {
          scalar_t* out = panels.data() + block * panel * depth;
          const scalar_t* in = rows.data() + block * panel * stride;
          for (int64_t d = 0; d < depth; ++d)
            for (int i = 0; i < panel; ++i) out[d * panel + i] = in[i * stride + d];
        }
        if (view.panels_bf16) {
          uint16_t* out = panels_bf16.data() + block * panel * depth_bf16;
          const uint16_t* in = rows_bf16.data() + block * panel * depth_bf16;
          for (int64_t d = 0; d < depth_bf16; d += 2)
            for (int i = 0; i < panel; ++i) std::memcpy(out + d * panel + 2 * i, in + i * depth_bf16 + d, 4);
        }
      }
      longest_of[worker] = std::sqrt(longest_square);
    });
    for (double value : longest_of)
      if (!(value <= longest)) longest = std::isnan(longest) ? longest : value;
    view.finite_rows = view.rows;
    if (!std::isfinite(longest)) copy_finite_rows();
  }

  // What is not a number reaches the gradients through the weights of its pairs alone: in a product it would meet the
  // weight 0 of all others, and 0 times NaN is NaN.
  void copy_finite_rows() {
    finite_rows = Buffer<scalar_t>(rows.size());
    for (int64_t i = 0; i < rows.size(); ++i) finite_rows[i] = std::isfinite(rows[i]) ? rows[i] : scalar_t(0);
    view.finite_rows = finite_rows.data();
  }
};

// Labels and descriptors of one block of kTile sorted patches.
struct BlockRange {
  int64_t first_label, last_label;
  double lowest, highest;                 // descriptor
  double positive_bound, negative_bound;  // the largest and the smallest of the block
};

// --- Step 3: the problem, ready for its tiles
// ---------------------------------------------------------------------------

// The order of the tiles: in rounds, within which no block appears twice, so that its tiles can run side by side. A
// block meets its tiles in the order of the rounds, whatever the number of threads, and with it every sum is the same.
struct Step {
  int64_t row_block, column_block;
  int64_t row_turn, column_turn;  // how many rounds must lie behind the last tile of the block before this one
  int64_t round;
};

class Rounds {
 public:
  Rounds(int64_t rows, int64_t columns, bool symmetric)
      : rows_(rows), columns_(columns), symmetric_(symmetric), short_(std::min(rows, columns)) {}

  int64_t count() const { return rows_ * columns_; }

  // False where the step has no tile: a symmetric problem meets each pair of blocks once.
  bool step(int64_t ticket, Step& out) const {
    const int64_t round = ticket / short_, i = ticket % short_;
    if (symmetric_) {
      const int64_t j = (round - i + rows_) % rows_;
      out = {i, j, round, round, round};
      return i <= j;
    }
    const int64_t longer = std::max(rows_, columns_), j = (i + round) % longer;
    // A block of the longer side pauses after it has met the first block of the shorter one.
    const int64_t turn = std::max<int64_t>(i + 1 < short_ ? round : round + short_ - longer, 0);
    if (rows_ <= columns_)
      out = {i, j, round, turn, round};
    else
      out = {j, i, turn, round, round};
    return true;
  }

 private:
  int64_t rows_, columns_;
  bool symmetric_;
  int64_t short_;
};

template <typename scalar_t>
class Problem {
 public:
  Problem(const ContrastInputs<scalar_t>& inputs, const Parallel& parallel)
      : inputs_(inputs), parallel_(parallel), table_(kernel_table()) {
    masked_ = inputs.masks.positive != nullptr;
    const scalar_t* key_descriptors = inputs.symmetric() ? inputs.descriptors : inputs.key_descriptors;
    std::vector<Patch> anchors = sorted_patches(inputs.anchors.rows, inputs.labels, inputs.descriptors, inputs.channels,
                                                inputs.ignore_index, !masked_);
    std::vector<Patch> keys;
    if (!inputs.symmetric())
      keys = sorted_patches(inputs.keys.rows, inputs.key_labels, key_descriptors, inputs.channels, inputs.ignore_index,
                            !masked_);
    rank_labels(anchors, keys);

    const bool identities = inputs.symmetric() || inputs.self_offset >= 0;
    const int64_t none = PackedSide<scalar_t>::kNoIdentity;
    anchors_.arrange(anchors, inputs.descriptors, inputs.channels,
                     !identities          ? none
                     : inputs.symmetric() ? 0
                                          : inputs.self_offset);
    // -2 for anchors and -1 + an index for keys never meet.
    if (!inputs.symmetric()) keys_.arrange(keys, key_descriptors, inputs.channels, 0);

    const int64_t key_count = inputs.symmetric() ? anchors_.view.count : keys_.view.count;
    const double work = double(anchors_.view.count) * key_count * std::max<int64_t>(inputs.depth, 1);
    workers_ = work < kSerialWork ? 1 : std::max(1, parallel.threads);
    anchors_.pack(inputs.anchors, inputs.depth, inputs.symmetric(), table_, workers_, parallel);
    if (!inputs.symmetric()) keys_.pack(inputs.keys, inputs.depth, true, table_, workers_, parallel);

    set_bounds();
    set_tile();
    row_ranges_ = block_ranges(tile_.anchors, true);
    if (!inputs.symmetric()) column_ranges_ = block_ranges(tile_.keys, false);
  }

  const ContrastTile<scalar_t>& tile() const { return tile_; }
  ContrastTile<scalar_t>& tile() { return tile_; }
  int64_t count() const { return anchors_.view.count; }
  int64_t padded() const { return anchors_.view.padded; }
  int32_t index(int64_t i) const { return anchors_.index[i]; }

  double weight_of_sums() const { return weight_of_sums_; }

  // No pair of this anchor counts from here on.
  void leave_out(int64_t i) {
    positive_bound_[i] = -std::numeric_limits<scalar_t>::infinity();
    negative_bound_[i] = std::numeric_limits<scalar_t>::infinity();
  }

  // Exponents are measured from a bound of all logits, or from the largest logit of each anchor. The weight of
  // negatives multiplies the sums where they can bear it: added to a large logit, its logarithm would be rounded away.
  void measure_exponents(bool fixed_shift) {
    const double weight = inputs_.negative_weight;
    const bool moderate = fixed_shift || (weight >= 1e-20 && weight <= 1e20);
    tile_.fixed_shift = fixed_shift;
    tile_.log_negative_weight = moderate ? scalar_t(0) : scalar_t(std::log(weight));
    weight_of_sums_ = moderate ? weight : 1;
  }

  // A descriptor or bound that is not a number leaves it undecided which pairs of an anchor count.
  bool undecided(int64_t i) const {
    if (masked_) return false;
    const ContrastSide<scalar_t>& keys = tile_.keys;
    if (std::isnan(positive_bound_[i]) || std::isnan(negative_bound_[i])) return keys.count > own_key(i);
    if (!inputs_.descriptors) return false;
    const bool own = unordered(anchors_.view, i);
    if (own && keys.count - own_key(i) > 0) return true;
    return undecided_keys_ - (own && own_key(i) ? 1 : 0) > 0;
  }

  void run(typename ContrastKernels<scalar_t>::Function function) {
    const int64_t row_blocks = tile_.anchors.padded / kTile, column_blocks = tile_.keys.padded / kTile;
    const Rounds rounds(row_blocks, column_blocks, inputs_.symmetric());
    if (rounds.count() == 0) return;
    // How many rounds lie behind the last tile of each block.
    std::vector<std::atomic<int64_t>> row_turn(row_blocks),
        column_turn_storage(inputs_.symmetric() ? 0 : column_blocks);
    std::vector<std::atomic<int64_t>>& column_turn = inputs_.symmetric() ? row_turn : column_turn_storage;
    std::atomic<int64_t> next{0};
    const int workers = int(std::min<int64_t>(workers_, rounds.count()));
    // Steps are taken in order and wait for earlier ones alone, so some step can always run.
    parallel_.run(workers, [&](int) {
      Scratch scratch(table_.contrast<scalar_t>());
      for (;;) {
        const int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= rounds.count()) return;
        Step step;
        if (!rounds.step(ticket, step)) continue;
        wait_for(row_turn[step.row_block], step.row_turn);
        wait_for(column_turn[step.column_block], step.column_turn);
        TileKind kind;
        if (classify(step, kind)) function(tile_, position(step, kind), scratch.view);
        row_turn[step.row_block].store(step.round + 1, std::memory_order_release);
        column_turn[step.column_block].store(step.round + 1, std::memory_order_release);
      }
    });
  }

  const Parallel& parallel() const { return parallel_; }
  int workers() const { return workers_; }
  const ContrastKernels<scalar_t>& kernels() const { return table_.contrast<scalar_t>(); }
  const KernelTable& table() const { return table_; }

 private:
  struct Scratch {
    Buffer<scalar_t> dots, disparity, row_sums, weights;
    Buffer<integer_t<scalar_t>> codes;
    ContrastScratch<scalar_t> view;
    explicit Scratch(const ContrastKernels<scalar_t>& kernels)
        : dots(kTile * kernels.panel),
          disparity(kTile * kernels.panel),
          row_sums(kTile * 4 * kernels.lanes),
          weights(kTile * kTile, 0),
          codes(kTile * kernels.panel),
          view{dots.data(), disparity.data(), codes.data(), row_sums.data(), weights.data()} {}
  };

  static void wait_for(const std::atomic<int64_t>& turn, int64_t wanted) {
    for (int spins = 0; turn.load(std::memory_order_acquire) != wanted; ++spins)
      if (spins > 256) std::this_thread::yield();
  }

  bool unordered(const ContrastSide<scalar_t>& side, int64_t i) const {
    for (int64_t c = 0; c < inputs_.channels; ++c)
      if (!std::isfinite(side.descriptor[c * side.padded + i])) return true;
    return false;
  }

  int64_t own_key(int64_t i) const {
    if (inputs_.symmetric()) return 1;
    if (inputs_.self_offset < 0) return 0;
    const int64_t key = anchors_.index[i] + inputs_.self_offset;
    return key < inputs_.keys.rows && inputs_.key_labels[key] != inputs_.ignore_index ? 1 : 0;
  }

  void set_bounds() {
    const int64_t padded = anchors_.view.padded;
    positive_bound_ = Buffer<scalar_t>(padded, inputs_.positive_bound);
    negative_bound_ = Buffer<scalar_t>(padded, inputs_.negative_bound);
    for (int64_t i = 0; i < anchors_.view.count; ++i) {
      if (inputs_.positive_bounds) positive_bound_[i] = inputs_.positive_bounds[anchors_.index[i]];
      if (inputs_.negative_bounds) negative_bound_[i] = inputs_.negative_bounds[anchors_.index[i]];
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
    tile_.depth_bf16 = round_up(inputs_.depth, 2);
    tile_.channels = inputs_.channels;
    tile_.symmetric = inputs_.symmetric();
    const double longest_key = inputs_.symmetric() ? anchors_.longest : keys_.longest;
    tile_.finite = std::isfinite(anchors_.longest) && std::isfinite(longest_key);
    const double bound = anchors_.longest * longest_key / inputs_.temperature * kLog2E;
    const double weight = inputs_.negative_weight;
    tile_.scale = scalar_t(kLog2E / inputs_.temperature);
    tile_.shift = scalar_t(bound);
    tile_.inverse_temperature = scalar_t(1 / inputs_.temperature);
    measure_exponents(bound <= kLargestFixedShift && (weight == 0 || (weight >= 1e-6 && weight <= 1e6)));
    if (inputs_.descriptors)
      for (int64_t j = 0; j < tile_.keys.count; ++j) undecided_keys_ += unordered(tile_.keys, j);
  }

  std::vector<BlockRange> block_ranges(const ContrastSide<scalar_t>& side, bool anchors) const {
    std::vector<BlockRange> ranges(side.padded / kTile);
    for (size_t b = 0; b < ranges.size(); ++b) {
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

  // The kind of a tile; false when no pair of it can count.
  bool classify(const Step& step, TileKind& kind) const {
    const BlockRange& rows = row_ranges_[step.row_block];
    const BlockRange& columns = (inputs_.symmetric() ? row_ranges_ : column_ranges_)[step.column_block];
    const bool diagonal = inputs_.symmetric() && step.row_block == step.column_block;
    const bool may_share_identity = diagonal || inputs_.self_offset >= 0;
    const int64_t width = std::min<int64_t>(kTile, tile_.keys.count - step.column_block * kTile);
    if (masked_) {
      kind = TileKind::kMasked;
      return true;
    }
    const bool same = rows.first_label == rows.last_label && columns.first_label == columns.last_label &&
                      rows.first_label == columns.first_label;
    const bool different = rows.last_label < columns.first_label || columns.last_label < rows.first_label;
    if (inputs_.channels == 1 && undecided_keys_ == 0) {
      // Rounded subtraction is monotonic, so the ends of the ranges bound every disparity as the kernel computes it.
      const double gap = std::max({0.0, double(scalar_t(rows.lowest) - scalar_t(columns.highest)),
                                   double(scalar_t(columns.lowest) - scalar_t(rows.highest))});
      const double reach = std::max(double(scalar_t(rows.highest) - scalar_t(columns.lowest)),
                                    double(scalar_t(columns.highest) - scalar_t(rows.lowest)));
      double positive_bound = rows.positive_bound, negative_bound = rows.negative_bound;
      if (inputs_.symmetric()) {
        positive_bound = std::max(positive_bound, columns.positive_bound);
        negative_bound = std::min(negative_bound, columns.negative_bound);
      }
      if (same && gap > positive_bound) return false;
      if (different && reach < negative_bound) return false;
    }
    kind = TileKind::kMixed;
    if (width % table_.contrast<scalar_t>().panel == 0) {
      if (same && !may_share_identity) kind = TileKind::kSame;
      if (different) kind = TileKind::kDifferent;
    }
    return true;
  }

  TilePosition position(const Step& step, TileKind kind) const {
    const int64_t row = step.row_block * kTile, column = step.column_block * kTile;
    return {row,    std::min<int64_t>(kTile, tile_.anchors.count - row),
            column, std::min<int64_t>(kTile, tile_.keys.count - column),
            kind,   inputs_.symmetric() && step.row_block == step.column_block};
  }

  const ContrastInputs<scalar_t>& inputs_;
  const Parallel& parallel_;
  const KernelTable& table_;
  bool masked_ = false;
  int workers_ = 1;
  int64_t undecided_keys_ = 0;
  double weight_of_sums_ = 1;
  PackedSide<scalar_t> anchors_, keys_;
  Buffer<scalar_t> positive_bound_, negative_bound_;
  ContrastTile<scalar_t> tile_;
  std::vector<BlockRange> row_ranges_, column_ranges_;
};

}  // namespace

template <typename scalar_t>
void patch_contrast_forward(const ContrastInputs<scalar_t>& inputs, const AnchorSums<scalar_t>& out,
                            const Parallel& parallel) {
  const scalar_t infinity = std::numeric_limits<scalar_t>::infinity(), nan = std::numeric_limits<scalar_t>::quiet_NaN();
  const int64_t n = inputs.anchors.rows;
  std::fill_n(out.loss, n, scalar_t(0));
  std::fill_n(out.max_logit, n, -infinity);
  std::fill_n(out.log_sum, n, -infinity);
  std::fill_n(out.positive_logit, n, scalar_t(0));
  std::fill_n(out.num_positives, n, 0);

  Problem<scalar_t> problem(inputs, parallel);
  const int64_t padded = problem.padded();
  ContrastTile<scalar_t>& tile = problem.tile();
  Buffer<scalar_t> max_logit(padded, -infinity);
  Buffer<scalar_t> sums(4 * padded, 0);
  tile.state.max_logit = max_logit.data();
  tile.state.positive_exp = sums.data();
  tile.state.negative_exp = sums.data() + padded;
  tile.state.positive_logit = sums.data() + 2 * padded;
  tile.state.positive_count = sums.data() + 3 * padded;

  if (!tile.fixed_shift) {
    problem.run(problem.kernels().maximum);
    for (int64_t i = 0; i < padded; ++i)
      if (max_logit[i] == -infinity) max_logit[i] = 0;  // no pair, or none with a weight
  }
  problem.run(problem.kernels().sum);

  // A negative of small weight may lie that much above the logarithm of the denominator.
  const double lower_weight = inputs.negative_weight > 0 ? std::min(std::log(inputs.negative_weight), 0.0) : 0.0;
  for (int64_t i = 0; i < problem.count(); ++i) {
    const int64_t row = problem.index(i);
    const double total =
        double(tile.state.positive_exp[i]) + problem.weight_of_sums() * double(tile.state.negative_exp[i]);
    const int32_t count = int32_t(tile.state.positive_count[i]);
    const double positive_sum = double(tile.state.positive_logit[i]);
    out.num_positives[row] = count;
    if (problem.undecided(i)) {
      out.loss[row] = out.max_logit[row] = out.log_sum[row] = nan;
      out.num_positives[row] = std::max(count, 1);
    } else if (tile.fixed_shift) {
      const double lse = (double(tile.shift) + std::log2(total)) * kLn2;
      const double positive = count > 0 ? positive_sum / (inputs.temperature * count) : 0;
      if (total == 0) continue;
      out.max_logit[row] = scalar_t(lse - lower_weight);
      out.log_sum[row] = scalar_t(lse - double(out.max_logit[row]));
      out.positive_logit[row] = scalar_t(positive);
      if (count > 0) out.loss[row] = scalar_t(lse - positive);
    } else {
      // The logits of the positives are known less the maximum: their difference to it is exact however large they are.
      const double below_maximum = count > 0 ? positive_sum / (kLogitUnit * count) : 0;
      if (total == 0) continue;
      out.max_logit[row] = max_logit[i];
      out.log_sum[row] = scalar_t(std::log(total));
      if (count == 0) continue;
      out.positive_logit[row] = scalar_t(double(max_logit[i]) + below_maximum);
      out.loss[row] = scalar_t(std::log(total) - below_maximum);
    }
  }
}

// The coefficients of each anchor: dL/ds_ip = g (p_ip - 1 / |P|), dL/ds_in = g p_in, and 1 / temperature goes with g.
template <typename scalar_t>
struct Coefficients {
  Buffer<scalar_t> max_logit, positive, negative, mean;
  double largest = 0;

  Coefficients(Problem<scalar_t>& problem, const ContrastInputs<scalar_t>& inputs, const ContrastTile<scalar_t>& tile,
               const scalar_t* grad_rows, const scalar_t* saved_max_logit, const scalar_t* log_sum,
               const int32_t* num_positives)
      : max_logit(problem.padded(), std::numeric_limits<scalar_t>::infinity()),
        positive(problem.padded(), 0),
        negative(problem.padded(), 0),
        mean(problem.padded(), 0) {
    for (int64_t i = 0; i < problem.count(); ++i) {
      const int64_t row = problem.index(i);
      const double g = double(grad_rows[row]) / inputs.temperature;
      if (num_positives[row] == 0 || g == 0) {
        problem.leave_out(i);
        continue;
      }
      // What turns the kernel's exponentials into shares.
      const double base = tile.fixed_shift ? double(tile.shift) * kLn2 - double(saved_max_logit[row]) : 0;
      const double share = g * std::exp(base - double(log_sum[row]));
      const double weighted_share = share * problem.weight_of_sums();
      max_logit[i] = saved_max_logit[row];
      positive[i] = scalar_t(share);
      negative[i] = scalar_t(weighted_share);
      mean[i] = scalar_t(g / num_positives[row]);
      largest = std::max({largest, std::abs(share), std::abs(weighted_share)});
    }
  }
};

template <typename scalar_t>
void patch_contrast_backward(const ContrastInputs<scalar_t>& inputs, const scalar_t* grad_rows,
                             const scalar_t* max_logit, const scalar_t* log_sum, const int32_t* num_positives,
                             void* grad_anchors, void* grad_keys, const Parallel& parallel) {
  Problem<scalar_t> problem(inputs, parallel);
  ContrastTile<scalar_t>& tile = problem.tile();
  const auto coefficients_of = [&] {
    return Coefficients<scalar_t>(problem, inputs, tile, grad_rows, max_logit, log_sum, num_positives);
  };
  Coefficients<scalar_t> coefficients = coefficients_of();
  if (tile.fixed_shift && coefficients.largest > kLargestCoefficient) {
    // A large upstream gradient meets an anchor whose logits all lie far below the bound: its own maximum serves it.
    problem.measure_exponents(false);
    coefficients = coefficients_of();
  }
  tile.state.max_logit = coefficients.max_logit.data();
  tile.state.positive_coefficient = coefficients.positive.data();
  tile.state.negative_coefficient = coefficients.negative.data();
  tile.state.mean_coefficient = coefficients.mean.data();

  // Gradients of the accumulating type are summed where they belong, the others in a sorted copy.
  const bool direct = inputs.anchors.dtype == (sizeof(scalar_t) == 8 ? DType::kFloat64 : DType::kFloat32);
  Buffer<scalar_t> anchor_sums, key_sums;
  tile.grad_stride = inputs.depth;
  tile.grad_indexed = direct;
  if (direct) {
    tile.grad_anchors = static_cast<scalar_t*>(grad_anchors);
    tile.grad_keys = static_cast<scalar_t*>(inputs.symmetric() ? grad_anchors : grad_keys);
  } else {
    if (grad_anchors) anchor_sums = Buffer<scalar_t>(problem.padded() * inputs.depth, 0);
    if (grad_keys) key_sums = Buffer<scalar_t>(tile.keys.padded * inputs.depth, 0);
    tile.grad_anchors = anchor_sums.data();
    tile.grad_keys = inputs.symmetric() ? anchor_sums.data() : key_sums.data();
  }
  problem.run(problem.kernels().gradient);

  const auto write_back = [&](const Buffer<scalar_t>& sums, const ContrastSide<scalar_t>& side, void* out) {
    parallel.run(problem.workers(), [&](int worker) {
      const Share share(side.count, problem.workers(), worker);
      for (int64_t i = share.first; i < share.last; ++i)
        write_elements(sums.data() + i * inputs.depth, inputs.depth, out, inputs.anchors.dtype,
                       int64_t(side.index[i]) * inputs.depth);
    });
  };
  if (!direct && grad_anchors) write_back(anchor_sums, tile.anchors, grad_anchors);
  if (!direct && grad_keys) write_back(key_sums, tile.keys, grad_keys);

  if (!grad_anchors) return;
  std::vector<scalar_t> unknown(inputs.depth, std::numeric_limits<scalar_t>::quiet_NaN());
  for (int64_t i = 0; i < problem.count(); ++i) {
    const int64_t out = problem.index(i);
    if (num_positives[out] > 0 && std::isnan(log_sum[out]) && grad_rows[out] != 0)
      write_elements(unknown.data(), inputs.depth, grad_anchors, inputs.anchors.dtype, out * inputs.depth);
  }
}

template void patch_contrast_forward<float>(const ContrastInputs<float>&, const AnchorSums<float>&, const Parallel&);
template void patch_contrast_forward<double>(const ContrastInputs<double>&, const AnchorSums<double>&, const Parallel&);
template void patch_contrast_backward<float>(const ContrastInputs<float>&, const float*, const float*, const float*,
                                             const int32_t*, void*, void*, const Parallel&);
template void patch_contrast_backward<double>(const ContrastInputs<double>&, const double*, const double*,
                                              const double*, const int32_t*, void*, void*, const Parallel&);

}  // namespace pglcl
