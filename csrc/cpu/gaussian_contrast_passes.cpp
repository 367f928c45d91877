// The tiles of the Gaussian contrastive loss (method, section 6). Anchors are grouped by class, so that all anchors of
// a tile need the same row of the (classes, classes) table of statistics.
#include "gaussian_contrast.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "convert.h"
#include "isa/kernel_table.h"
#include "transpose.h"

namespace pglcl {
namespace {

template <typename scalar_t>
bool counts(const GaussianInputs<scalar_t>& x, int64_t label) {
  return label != x.ignore_index && label >= 0 && label < x.classes && x.counts[label] > 0;
}

// The classes that take part, and their number.
struct TakingPart {
  Buffer<bool> classes;  // (classes,)
  int64_t count = 0;

  template <typename scalar_t>
  explicit TakingPart(const GaussianInputs<scalar_t>& x) : classes(x.classes) {
    for (int64_t k = 0; k < x.classes; ++k) count += classes[k] = x.counts[k] > 0;
  }
};

struct TileOfClass {
  int64_t label, first, rows;  // its anchors are order[first] to order[first + rows - 1]
};

// The anchors that count, by a stable counting sort in the order of their classes, and the tiles that they form.
struct SortedAnchors {
  Buffer<bool> in_class;  // (classes,): whether an anchor of the class counts
  Buffer<TileOfClass> tiles;
  Buffer<int64_t> order;

  template <typename scalar_t>
  explicit SortedAnchors(const GaussianInputs<scalar_t>& x)
      : in_class(x.classes), tiles(x.n / kGaussianRows + x.classes) {
    Buffer<int64_t> first(x.classes + 1, 0);
    for (int64_t i = 0; i < x.n; ++i)
      if (counts(x, x.labels[i])) ++first[x.labels[i] + 1];
    int64_t num_tiles = 0;
    for (int64_t k = 0; k < x.classes; ++k) {
      in_class[k] = first[k + 1] > 0;
      for (int64_t done = 0; done < first[k + 1]; done += kGaussianRows)
        tiles[num_tiles++] = {k, first[k] + done, std::min<int64_t>(kGaussianRows, first[k + 1] - done)};
      first[k + 1] += first[k];
    }
    tiles.shrink(num_tiles);
    order = Buffer<int64_t>(first[x.classes]);
    for (int64_t i = 0; i < x.n; ++i)
      if (counts(x, x.labels[i])) order[first[x.labels[i]]++] = i;
  }
};

// The statistics with padded rows and symmetric covariances, since only their symmetric part enters the quadratic form.
template <typename scalar_t>
struct PackedStatistics {
  int64_t sets, stride;  // sets: 1, or one per class of anchors
  Buffer<scalar_t> means, covariances;

  PackedStatistics(const GaussianInputs<scalar_t>& x, const Buffer<bool>& in_class, int panel, const Parallel& parallel)
      : sets(x.pairwise ? x.classes : 1),
        stride((x.depth + panel - 1) / panel * panel),
        means(sets * x.classes * stride),
        covariances(sets * x.classes * x.depth * stride) {
    const int64_t matrices = sets * x.classes, blocks = (x.depth + kRows - 1) / kRows;
    const int workers = int(std::clamp<int64_t>(matrices * x.depth / 64, 1, parallel.threads));
    parallel.run(workers, [&](int worker) {
      const Share share(matrices * blocks, workers, worker);
      for (int64_t at = share.first; at < share.last; ++at) {
        const int64_t matrix = at / blocks, first = at % blocks * kRows, last = std::min(first + kRows, x.depth);
        if (x.counts[matrix % x.classes] <= 0 || (x.pairwise && !in_class[matrix / x.classes])) continue;
        scalar_t* to = covariances.data() + matrix * x.depth * stride;
        symmetric_rows(x.covariances + matrix * x.depth * x.depth, x.depth, first, last, to, stride);
        for (int64_t row = first; row < last; ++row)
          std::fill(to + row * stride + x.depth, to + (row + 1) * stride, scalar_t(0));
        if (first > 0) continue;
        scalar_t* mean = means.data() + matrix * stride;
        std::copy_n(x.means + matrix * x.depth, x.depth, mean);
        std::fill(mean + x.depth, mean + stride, scalar_t(0));
      }
    });
  }

 private:
  // Rows of a matrix that are averaged with its columns at a time: the elements of a column's rows fill a cache line.
  static constexpr int64_t kRows = 16;
};

// The results of anchors that do not count are zero.
template <typename scalar_t>
void clear_left_out(const GaussianInputs<scalar_t>& x, scalar_t* losses, scalar_t* gradients) {
  for (int64_t i = 0; i < x.n; ++i) {
    if (counts(x, x.labels[i])) continue;
    losses[i] = 0;
    if (gradients) std::fill_n(gradients + i * x.depth, x.depth, scalar_t(0));
  }
}

// Computes one worker's share of the tiles.
template <typename scalar_t>
void run_share(const GaussianInputs<scalar_t>& x, const GaussianKernels<scalar_t>& kernels, const SortedAnchors& sorted,
               const TakingPart& taking_part, const PackedStatistics<scalar_t>& packed, const Share& share,
               scalar_t* losses, scalar_t* gradients) {
  const Arena::Call call;
  const int64_t stride = packed.stride;
  Buffer<scalar_t> anchors(kGaussianRows * stride, scalar_t(0)), products(kGaussianRows * stride);
  Buffer<scalar_t> rows(gradients ? kGaussianRows * stride : 0);
  scalar_t tile_losses[kGaussianRows];
  for (int64_t at = share.first; at < share.last; ++at) {
    const TileOfClass& tile = sorted.tiles[at];
    const int64_t* index = sorted.order.data() + tile.first;
    for (int64_t r = 0; r < tile.rows; ++r)
      read_elements(x.anchors, x.dtype, index[r] * x.depth, x.depth, anchors.data() + r * stride);
    const int64_t set = x.pairwise ? tile.label * x.classes : 0;
    kernels.tile({anchors.data(), tile.rows, x.depth, stride, tile.label, x.classes, taking_part.classes.data(),
                  packed.means.data() + set * stride, packed.covariances.data() + set * x.depth * stride,
                  scalar_t(1 / x.temperature), scalar_t(x.covariance_scale / (x.temperature * x.temperature)),
                  scalar_t(std::log(x.negative_weight / double(taking_part.count))), products.data(), tile_losses,
                  gradients ? rows.data() : nullptr});
    for (int64_t r = 0; r < tile.rows; ++r) {
      losses[index[r]] = tile_losses[r];
      if (gradients) std::copy_n(rows.data() + r * stride, x.depth, gradients + index[r] * x.depth);
    }
  }
}

template <typename scalar_t>
int64_t run_tiles(const GaussianInputs<scalar_t>& x, scalar_t* losses, scalar_t* gradients, const Parallel& parallel) {
  const Arena::Call call;
  clear_left_out(x, losses, gradients);
  const SortedAnchors sorted(x);
  if (sorted.order.size() == 0) return 0;
  const TakingPart taking_part(x);
  const GaussianKernels<scalar_t>& kernels = kernel_table().gaussian<scalar_t>();
  const PackedStatistics<scalar_t> packed(x, sorted.in_class, kernels.panel, parallel);
  const int64_t tiles = sorted.tiles.size();
  const int workers = int(std::clamp<int64_t>(tiles, 1, parallel.threads));
  parallel.run(workers, [&](int worker) {
    run_share(x, kernels, sorted, taking_part, packed, Share(tiles, workers, worker), losses, gradients);
  });
  return sorted.order.size();
}

bool all_finite(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

// Exponents beyond the range of float32 make a loss or gradient that is not finite. All is then computed in float64.
int64_t run_tiles_in_float64(const GaussianInputs<float>& x, float* losses, float* gradients,
                             const Parallel& parallel) {
  const Arena::Call call;
  const int64_t sets = x.pairwise ? x.classes : 1, rows = sets * x.classes * x.depth;
  Buffer<double> means(rows), covariances(rows * x.depth), wide(x.n), wide_gradients(gradients ? x.n * x.depth : 0);
  std::copy_n(x.means, means.size(), means.data());
  std::copy_n(x.covariances, covariances.size(), covariances.data());
  const GaussianInputs<double> inputs{
      x.anchors,          x.dtype,  x.n,        x.depth,       x.classes,          x.labels,          means.data(),
      covariances.data(), x.counts, x.pairwise, x.temperature, x.covariance_scale, x.negative_weight, x.ignore_index};
  const int64_t valid = run_tiles<double>(inputs, wide.data(), gradients ? wide_gradients.data() : nullptr, parallel);
  std::copy_n(wide.data(), wide.size(), losses);
  if (gradients) std::copy_n(wide_gradients.data(), wide_gradients.size(), gradients);
  return valid;
}

}  // namespace

template <typename scalar_t>
int64_t find_bad_label(const GaussianInputs<scalar_t>& x) {
  for (int64_t i = 0; i < x.n; ++i)
    if (x.labels[i] != x.ignore_index && (x.labels[i] < 0 || x.labels[i] >= x.classes)) return i;
  return -1;
}

template <typename scalar_t>
int64_t gaussian_contrast(const GaussianInputs<scalar_t>& x, scalar_t* losses, scalar_t* gradients,
                          const Parallel& parallel) {
  const int64_t valid = run_tiles(x, losses, gradients, parallel);
  if constexpr (sizeof(scalar_t) == 4)
    if (!all_finite(losses, x.n) || (gradients && !all_finite(gradients, x.n * x.depth)))
      return run_tiles_in_float64(x, losses, gradients, parallel);
  return valid;
}

template int64_t find_bad_label(const GaussianInputs<float>&);
template int64_t find_bad_label(const GaussianInputs<double>&);
template int64_t gaussian_contrast(const GaussianInputs<float>&, float*, float*, const Parallel&);
template int64_t gaussian_contrast(const GaussianInputs<double>&, double*, double*, const Parallel&);

}  // namespace pglcl
