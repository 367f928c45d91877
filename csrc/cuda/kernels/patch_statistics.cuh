// Patch statistics on the GPU (method, section 2). A warp computes a patch: its lanes walk the pixels, and warp
// reductions add their sums, without atomics.
//
// The backward pass has two kernels. The first, of the same kind, turns the upstream gradients into coefficients of
// each patch. It sums the patch again, to keep the digits of a class of denormal probabilities. The second gathers the
// coefficients pixel by pixel.
#pragma once

#include <initializer_list>

#include "../../shared/patch_grid.h"
#include "device.h"

namespace pglcl::cuda {

constexpr int kStatisticsThreads = 128;  // four patches per block
constexpr int kStatisticsWarps = kStatisticsThreads / 32;

// Probabilities are summed times 2^64, so that a class of denormal probabilities keeps its digits.
template <typename scalar_t>
constexpr scalar_t kMassScale = scalar_t(18446744073709551616.0);

PGLCL_DEVICE float natural_log(float x) { return logf(x); }
PGLCL_DEVICE double natural_log(double x) { return log(x); }
PGLCL_DEVICE float natural_exp(float x) { return expf(x); }
PGLCL_DEVICE double natural_exp(double x) { return exp(x); }

// kMassScale e^x for x <= 0. Where e^x is small, a part of the scale is added to the exponent. It is the whole number
// 44, so that the sum is exact.
template <typename scalar_t>
PGLCL_DEVICE scalar_t scaled_exp(scalar_t x) {
  const bool small = x < scalar_t(-40);
  const scalar_t rest = scalar_t(18446744073709551616.0 / 12851600114359308275.8);  // 2^64 e^-44
  return natural_exp(small ? x + scalar_t(44) : x) * (small ? rest : kMassScale<scalar_t>);
}

// A logit less the highest, but at least kFarthest, where e^x is 0, scaled or not. The difference may be infinite (of a
// masked class, or at the end of the type's range), and 0 times infinity would be NaN. NaN stays NaN.
template <typename scalar_t>
constexpr scalar_t kFarthest = sizeof(scalar_t) == 4 ? scalar_t(-256) : scalar_t(-2048);
template <typename scalar_t>
PGLCL_DEVICE scalar_t distance_below(scalar_t logit, scalar_t highest) {
  const scalar_t distance = logit - highest;
  return distance < kFarthest<scalar_t> ? kFarthest<scalar_t> : distance;
}

// The grid in 32-bit numbers, which divide faster. Offsets into memory have 64 bits.
struct StatisticsGrid {
  int64_t batch, pixels, patches;
  int classes;
  int image[3], patch[3], stride[3], grid[3];
};

inline StatisticsGrid narrowed(const PatchGrid& g) {
  StatisticsGrid out{g.batch, g.pixels(), g.patches(), int(g.classes), {}, {}, {}, {}};
  for (int d = 0; d < 3; ++d) {
    out.image[d] = int(g.image[d]);
    out.patch[d] = int(g.patch[d]);
    out.stride[d] = int(g.stride[d] < g.image[d] ? g.stride[d] : g.image[d]);  // a longer stride also leaves one patch
    out.grid[d] = int(g.grid[d]);
  }
  return out;
}

// The most pixels of an image, and the most classes, that 32-bit numbers count.
constexpr int64_t kMostPixels = (int64_t(1) << 31) - 1;

// A tensor of shape (B, K, Z, Y, X), or (B, Z, Y, X) with a stride of 0 for K, with any strides.
template <typename T>
struct Strided {
  T* data;
  int64_t batch, classes, at[3];

  PGLCL_HOST_DEVICE int64_t offset(int64_t b, int64_t k, int z, int y, int x) const {
    return b * batch + k * classes + z * at[0] + y * at[1] + x * at[2];
  }
};

template <typename scalar_t>
PGLCL_DEVICE scalar_t p_log_p(scalar_t p) {
  return p <= scalar_t(0) ? scalar_t(0) : p * natural_log(p);
}

// Reads up to kHeld classes of kPixels neighbours into registers, with 16-byte loads unless kPixels is 1.
template <typename T, int kPixels, int kHeld, typename scalar_t>
PGLCL_DEVICE void read_pixels(Global<const T> input, int64_t at, int64_t class_stride, int classes,
                              scalar_t (&values)[kHeld][kPixels]) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= classes) break;
    if constexpr (kPixels == 1) {
      values[k][0] = widen(input.load(at + k * class_stride));
    } else {
      const Vector<T, kPixels> loaded = input.template load_vector<kPixels>(at + k * class_stride);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) values[k][i] = widen(loaded.at[i]);
    }
  }
}

// Turns the values of one pixel into probabilities times kMassScale and returns its entropy.
template <typename scalar_t, int kPixels, int kHeld>
PGLCL_DEVICE scalar_t softmax_in_place(scalar_t (&values)[kHeld][kPixels], int i, int classes, bool probabilities) {
  if (probabilities) {
    scalar_t h = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k >= classes) break;
      h -= p_log_p(values[k][i]);
      values[k][i] *= kMassScale<scalar_t>;
    }
    return h;
  }
  scalar_t highest = values[0][i], weighted = 0;
  int certain = 0;
#pragma unroll
  for (int k = 1; k < kHeld; ++k)
    if (k < classes && !(values[k][i] <= highest)) {
      highest = values[k][i];
      certain = k;
    }
  // rest: the sum of e^(l - highest) without the highest itself, whose 1 would swallow the digits of a certain pixel.
  // It begins as NaN where the highest is infinite: such a pixel has no probabilities.
  scalar_t rest = highest - highest;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= classes) break;
    const scalar_t centred = distance_below(values[k][i], highest);
    const scalar_t scaled = scaled_exp(centred), e = scaled / kMassScale<scalar_t>;
    if (k != certain) rest += e;
    weighted += e * centred;
    values[k][i] = scaled;
  }
  const scalar_t inverse = scalar_t(1) / (scalar_t(1) + rest);
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (k < classes) values[k][i] *= inverse;
  return log_of_one_and(rest) - weighted * inverse;
}

// What one pass over the classes of a pixel finds. log_sum is the logarithm of the sum of e^(logit - highest). It is
// kept apart from the highest logit, since their sum would be rounded. Both are 0 for probabilities.
template <typename scalar_t>
struct PixelEntropy {
  scalar_t entropy, highest, log_sum;

  PGLCL_DEVICE scalar_t log_probability(scalar_t logit) const { return distance_below(logit, highest) - log_sum; }
};

template <typename T, typename scalar_t>
PGLCL_DEVICE PixelEntropy<scalar_t> scan_pixel(Global<const T> input, int64_t at, int64_t class_stride, int classes,
                                               bool probabilities) {
  if (probabilities) {
    scalar_t h = 0;
    for (int k = 0; k < classes; ++k) h -= p_log_p(scalar_t(widen(input.load(at + k * class_stride))));
    return {h, 0, 0};
  }
  // rest and weighted: sums of e^(l - highest) and (l - highest) e^(l - highest) without the highest itself.
  scalar_t highest = widen(input.load(at)), rest = 0, weighted = 0;
  for (int k = 1; k < classes; ++k) {
    const scalar_t l = widen(input.load(at + k * class_stride));
    if (highest == -scalar_t(INFINITY)) {  // the classes so far have a probability of 0
      highest = l;
    } else if (l <= highest) {
      const scalar_t centred = distance_below(l, highest), e = natural_exp(centred);
      rest += e;
      weighted += e * centred;
    } else {  // a new maximum, or NaN
      const scalar_t step = distance_below(highest, l), keep = natural_exp(step);
      weighted = (weighted + step * (scalar_t(1) + rest)) * keep;
      rest = (scalar_t(1) + rest) * keep;
      highest = l;
    }
  }
  rest += highest - highest;  // NaN where the highest is infinite: such a pixel has no probabilities
  const scalar_t log_sum = log_of_one_and(rest);
  return {log_sum - weighted / (scalar_t(1) + rest), highest, log_sum};
}

// The pixels of a patch that one lane walks: every 32nd group of neighbours along a row. No step divides.
struct PatchWalk {
  int x, y, z, groups;     // x: of the `groups` of a row
  int rows_on, groups_on;  // a step of 32 groups
  int rows_of_slice, slices;

  PGLCL_DEVICE PatchWalk(const StatisticsGrid& g, int first, int pixels)
      : x(first), y(0), z(0), groups(g.patch[2] / pixels), rows_of_slice(g.patch[1]), slices(g.patch[0]) {
    rows_on = 32 / groups;
    groups_on = 32 % groups;
    y = x / groups;
    x -= y * groups;
    carry();
  }
  PGLCL_DEVICE bool there() const { return z < slices; }
  PGLCL_DEVICE void advance() {
    x += groups_on;
    y += rows_on;
    if (x >= groups) {
      x -= groups;
      ++y;
    }
    carry();
  }

 private:
  PGLCL_DEVICE void carry() {
    while (y >= rows_of_slice && z < slices) {
      y -= rows_of_slice;
      ++z;
    }
  }
};

// Where there are too many classes for registers, a warp keeps entropy, highest logit and log_sum of this many pixels
// in shared memory. Each logit is then read twice.
constexpr int kChunkPixels = 128;

template <typename scalar_t>
constexpr int64_t kStatisticsShared = kStatisticsWarps * 3 * kChunkPixels * int64_t(sizeof(scalar_t));

// Two numbers for each class of a patch, (B, K, patches) each.
template <typename scalar_t>
struct ClassNumbers {
  Global<scalar_t> first, second;
  int64_t at, step;  // the place of class 0, and the distance to the next class

  PGLCL_DEVICE ClassNumbers(scalar_t* first_data, scalar_t* second_data, const StatisticsGrid& g, int64_t b,
                            int64_t patch)
      : first(first_data), second(second_data), at(b * g.classes * g.patches + patch), step(g.patches) {}

  PGLCL_DEVICE void store(int k, scalar_t a, scalar_t b) const {
    first.store(at + k * step, a);
    second.store(at + k * step, b);
  }
};

template <typename T>
struct StatisticsInput {
  Strided<const T> input;
  StatisticsGrid grid;
  bool probabilities, normalize;
  double log_classes;
};

// Sums one patch by its warp. Lane 0 calls write_class(k, sum of p_k, sum of p_k h), both sums times kMassScale.
// Returns the sum of h. kHeld: classes held in registers, so that every logit is read once; 0: any number of classes,
// of which every logit is read twice. `classes_of_patch` then holds the sums over the pixels so far, until write_class
// writes there.
template <typename T, int kHeld, int kPixels, typename Write, typename scalar_t = typename Accumulate<T>::type>
PGLCL_DEVICE scalar_t sum_patch(const StatisticsInput<T>& s, int64_t b, int gz, int gy, int gx,
                                const ClassNumbers<scalar_t>& classes_of_patch, Write write_class) {
  const StatisticsGrid& g = s.grid;
  const Global<const T> input(s.input.data);
  const int lane = thread_index() % 32, classes = g.classes;
  const int64_t origin = s.input.offset(b, 0, gz * g.stride[0], gy * g.stride[1], gx * g.stride[2]);
  const int64_t class_stride = s.input.classes;
  scalar_t total = 0;
  if constexpr (kHeld > 0) {
    scalar_t mass[kHeld] = {}, product[kHeld] = {};
    for (PatchWalk at(g, lane, kPixels); at.there(); at.advance()) {
      scalar_t values[kHeld][kPixels];
      read_pixels<T, kPixels>(input, origin + s.input.offset(0, 0, at.z, at.y, at.x * kPixels), class_stride, classes,
                              values);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const scalar_t h = softmax_in_place(values, i, classes, s.probabilities);
        total += h;
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          if (k >= classes) break;
          mass[k] += values[k][i];
          product[k] += values[k][i] * h;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k >= classes) break;
      const scalar_t m = warp_sum(mass[k]), q = warp_sum(product[k]);
      if (lane == 0) write_class(k, m, q);
    }
  } else {
    SharedMemory memory;
    const Shared<scalar_t> pixel = memory.take<scalar_t>(kStatisticsWarps * 3 * kChunkPixels);
    const int pixel_at = thread_index() / 32 * 3 * kChunkPixels;
    PatchWalk walk(g, lane, 1);
    for (bool first = true, more = true; more; first = false) {  // by chunks; a lane reads only what it wrote
      const PatchWalk begin = walk;
      for (int i = lane; i < kChunkPixels && walk.there(); i += 32, walk.advance()) {
        const PixelEntropy<scalar_t> found = scan_pixel<T, scalar_t>(
            input, origin + s.input.offset(0, 0, walk.z, walk.y, walk.x), class_stride, classes, s.probabilities);
        pixel.store(pixel_at + 3 * i, found.entropy);
        pixel.store(pixel_at + 3 * i + 1, found.highest);
        pixel.store(pixel_at + 3 * i + 2, found.log_sum);
        total += found.entropy;
      }
      more = ballot(walk.there()) != 0;
      for (int k = 0; k < classes; ++k) {
        scalar_t mass = 0, product = 0;
        PatchWalk at = begin;
        for (int i = lane; i < kChunkPixels && at.there(); i += 32, at.advance()) {
          const scalar_t value = widen(input.load(origin + s.input.offset(0, k, at.z, at.y, at.x)));
          const PixelEntropy<scalar_t> found{pixel.load(pixel_at + 3 * i), pixel.load(pixel_at + 3 * i + 1),
                                             pixel.load(pixel_at + 3 * i + 2)};
          const scalar_t p = s.probabilities ? value * kMassScale<scalar_t> : scaled_exp(found.log_probability(value));
          mass += p;
          product += p * found.entropy;
        }
        mass = warp_sum(mass);
        product = warp_sum(product);
        if (lane != 0) continue;
        if (!first) {
          mass += classes_of_patch.first.load(classes_of_patch.at + k * classes_of_patch.step);
          product += classes_of_patch.second.load(classes_of_patch.at + k * classes_of_patch.step);
        }
        if (more)
          classes_of_patch.store(k, mass, product);
        else
          write_class(k, mass, product);
      }
    }
  }
  return warp_sum(total);
}

// The patch of this warp; `there` is false after the last one.
struct PatchPosition {
  int64_t b, index;  // within the image
  int z, y, x;
  bool there;

  PGLCL_DEVICE explicit PatchPosition(const StatisticsGrid& g) {
    const int64_t patch = int64_t(block_index()) * kStatisticsWarps + thread_index() / 32;
    there = patch < g.batch * g.patches;
    b = patch / g.patches;  // once per warp
    index = patch - b * g.patches;
    const unsigned j = unsigned(index), row = j / unsigned(g.grid[2]);
    x = int(j - row * unsigned(g.grid[2]));
    z = int(row / unsigned(g.grid[1]));
    y = int(row) - z * g.grid[1];
  }
};

template <typename scalar_t>
struct StatisticsOutput {
  scalar_t *entropy, *confidence, *class_entropy;  // contiguous
};

// kPixels: neighbours along a row that one lane reads at once. Patch width, stride and all strides in memory are
// multiples of it.
template <typename T, int kHeld, int kPixels>
PGLCL_KERNEL patch_statistics_forward(StatisticsInput<T> s, StatisticsOutput<typename Accumulate<T>::type> out) {
  using scalar_t = typename Accumulate<T>::type;
  const StatisticsGrid& g = s.grid;
  const PatchPosition patch(g);
  if (!patch.there) return;  // the whole warp
  const ClassNumbers<scalar_t> per_class(out.confidence, out.class_entropy, g, patch.b, patch.index);
  const scalar_t count = scalar_t(int64_t(g.patch[0]) * g.patch[1] * g.patch[2]);
  const scalar_t scale = s.normalize ? scalar_t(1 / s.log_classes) : scalar_t(1);
  const scalar_t highest = s.probabilities ? scalar_t(INFINITY) : s.normalize ? scalar_t(1) : scalar_t(s.log_classes);
  const scalar_t total = sum_patch<T, kHeld, kPixels>(
      s, patch.b, patch.z, patch.y, patch.x, per_class, [&](int k, scalar_t mass, scalar_t product) {
        scalar_t h = mass <= scalar_t(0) ? scalar_t(0) : product / mass * scale;
        if (h > highest) h = highest;
        per_class.store(k, mass / kMassScale<scalar_t> / count, h);
      });
  if (thread_index() % 32 != 0) return;
  scalar_t h = total / count * scale;
  if (h > highest) h = highest;
  Global<scalar_t>(out.entropy).store(patch.b * g.patches + patch.index, h);
}

// Coefficients of the classes of the patches, (B, K, patches): gamma = u / m and kappa = u / m H_k, where m is the sum
// of p_k times kMassScale, H_k the class entropy and u its upstream gradient.
template <typename scalar_t>
struct StatisticsCoefficients {
  scalar_t *gamma, *kappa;
};

template <typename T, int kHeld, int kPixels>
PGLCL_KERNEL patch_statistics_coefficients(StatisticsInput<T> s,
                                           Strided<const typename Accumulate<T>::type> grad_class_entropy,
                                           StatisticsCoefficients<typename Accumulate<T>::type> out) {
  using scalar_t = typename Accumulate<T>::type;
  const StatisticsGrid& g = s.grid;
  const PatchPosition patch(g);
  if (!patch.there) return;  // the whole warp
  const Global<const scalar_t> upstream(grad_class_entropy.data);
  const scalar_t scale = s.normalize ? scalar_t(1 / s.log_classes) : scalar_t(1);
  const ClassNumbers<scalar_t> per_class(out.gamma, out.kappa, g, patch.b, patch.index);
  sum_patch<T, kHeld, kPixels>(
      s, patch.b, patch.z, patch.y, patch.x, per_class, [&](int k, scalar_t mass, scalar_t product) {
        const scalar_t u = upstream.load(grad_class_entropy.offset(patch.b, k, patch.z, patch.y, patch.x));
        const scalar_t gamma = mass <= scalar_t(0) ? scalar_t(0) : u * scale / mass;
        per_class.store(k, gamma, mass <= scalar_t(0) ? scalar_t(0) : gamma * (product / mass));
      });
}

// The patches along one dimension that hold pixel x, from first to last - 1.
struct PatchSpan {
  int first, last;
  PGLCL_DEVICE PatchSpan(const StatisticsGrid& g, int d, int x)
      : first(x < g.patch[d] ? 0 : int(unsigned(x - g.patch[d]) / unsigned(g.stride[d])) + 1),
        last(int(unsigned(x) / unsigned(g.stride[d])) + 1) {
    if (last > g.grid[d]) last = g.grid[d];
  }
};

// The place of a patch in the grid.
PGLCL_DEVICE int64_t patch_index(const StatisticsGrid& g, int z, int y, int x) {
  return (int64_t(z) * g.grid[1] + y) * g.grid[2] + x;
}

template <typename T>
struct StatisticsGradients {
  Strided<const typename Accumulate<T>::type> entropy, confidence;  // upstream
  StatisticsCoefficients<const typename Accumulate<T>::type> coefficients;
  Strided<T> input;  // to be written
};

// One thread per pixel gathers the coefficients of the patches that hold it, so that nothing is scattered. With
// P = kMassScale p_k, the gradient of H_k by p_k, times p_k, is P (gamma h - kappa), and that by h is P gamma.
// kOverlap: several patches may hold a pixel. Otherwise the patch of a pixel is found once, not for each class.
template <typename T, bool kOverlap>
PGLCL_KERNEL patch_statistics_backward(StatisticsInput<T> s, StatisticsGradients<T> grads) {
  using scalar_t = typename Accumulate<T>::type;
  const StatisticsGrid& g = s.grid;
  const Global<const T> input(s.input.data);
  const Global<const scalar_t> grad_entropy(grads.entropy.data), grad_confidence(grads.confidence.data);
  const Global<const scalar_t> gammas(grads.coefficients.gamma), kappas(grads.coefficients.kappa);
  const Global<T> grad_input(grads.input.data);
  const int64_t pixel = int64_t(block_index()) * kStatisticsThreads + thread_index();
  if (pixel >= g.pixels) return;
  const unsigned row = unsigned(pixel) / unsigned(g.image[2]);
  const int px = int(unsigned(pixel) - row * unsigned(g.image[2]));
  const int pz = int(row / unsigned(g.image[1])), py = int(row) - pz * g.image[1];
  const PatchSpan xs(g, 2, px), ys(g, 1, py), zs(g, 0, pz);
  const bool inside = xs.first < xs.last && ys.first < ys.last && zs.first < zs.last;  // of any patch
  const int classes = g.classes;
  const scalar_t scale = s.normalize ? scalar_t(1 / s.log_classes) : scalar_t(1);
  const scalar_t per_pixel = scalar_t(1) / scalar_t(int64_t(g.patch[0]) * g.patch[1] * g.patch[2]);

  for (int64_t b = block_index_y(); b < g.batch; b += grid_blocks_y()) {
    const int64_t at = s.input.offset(b, 0, pz, py, px), out_at = grads.input.offset(b, 0, pz, py, px);
    const PixelEntropy<scalar_t> found = scan_pixel<T, scalar_t>(input, at, s.input.classes, classes, s.probabilities);
    const scalar_t h = found.entropy;
    // Sums over the patches of this pixel: of upstream gradients of c_k, gamma and kappa.
    struct Sums {
      scalar_t confidence, gamma, kappa;
    };
    const int64_t first_upstream = grads.confidence.offset(b, 0, zs.first, ys.first, xs.first);
    const int64_t first_patch = b * classes * g.patches + patch_index(g, zs.first, ys.first, xs.first);
    const auto gather = [&](int k) {
      Sums sums{0, 0, 0};
      const auto add = [&](int64_t upstream, int64_t patch) {
        sums.confidence += grad_confidence.load(upstream) * per_pixel;
        sums.gamma += gammas.load(patch);
        sums.kappa += kappas.load(patch);
      };
      if constexpr (kOverlap) {
        for (int z = zs.first; z < zs.last; ++z)
          for (int y = ys.first; y < ys.last; ++y)
            for (int x = xs.first; x < xs.last; ++x)
              add(grads.confidence.offset(b, k, z, y, x), (b * classes + k) * g.patches + patch_index(g, z, y, x));
      } else if (inside) {
        add(first_upstream + k * grads.confidence.classes, first_patch + k * g.patches);
      }
      return sums;
    };
    scalar_t dh = 0;
    if constexpr (kOverlap) {
      for (int z = zs.first; z < zs.last; ++z)
        for (int y = ys.first; y < ys.last; ++y)
          for (int x = xs.first; x < xs.last; ++x)
            dh += grad_entropy.load(grads.entropy.offset(b, 0, z, y, x)) * (per_pixel * scale);
    } else if (inside) {
      dh += grad_entropy.load(grads.entropy.offset(b, 0, zs.first, ys.first, xs.first)) * (per_pixel * scale);
    }
    scalar_t weighted = 0;  // sum of p_k dL/dp_k, with h held fixed
    for (int k = 0; k < classes; ++k) {
      const scalar_t value = widen(input.load(at + k * s.input.classes));
      const Sums sums = gather(k);
      const scalar_t scaled = s.probabilities ? value * kMassScale<scalar_t> : scaled_exp(found.log_probability(value));
      dh += scaled * sums.gamma;
      weighted += scaled / kMassScale<scalar_t> * sums.confidence + scaled * (sums.gamma * h - sums.kappa);
    }
    for (int k = 0; k < classes; ++k) {
      const scalar_t value = widen(input.load(at + k * s.input.classes));
      const Sums sums = gather(k);
      scalar_t gradient;
      if (s.probabilities) {
        // dh/dp = -(log p + 1); its value at p = 0, where it is infinite, is taken as 0.
        gradient = sums.confidence + (sums.gamma * h - sums.kappa) * kMassScale<scalar_t>;
        if (!(value <= scalar_t(0))) gradient -= dh * (natural_log(value) + scalar_t(1));
      } else {
        // dh/dlogit_k = -p_k (log p_k + h), and the softmax Jacobian for dp.
        const scalar_t log_p = found.log_probability(value), scaled = scaled_exp(log_p);
        gradient = scaled * (sums.gamma * h - sums.kappa) +
                   scaled / kMassScale<scalar_t> * (sums.confidence - weighted - dh * (log_p + h));
      }
      grad_input.store(out_at + k * grads.input.classes, narrow<T>(gradient));
    }
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

// Calls body.operator()<kHeld, kPixels>(), chosen by the number of classes and the alignment.
template <typename T, typename Body>
void with_statistics_path(const StatisticsInput<T>& s, Body body) {
  // 16-byte loads need rows, patches and strides that are multiples of them.
  constexpr int kPixels = 16 / sizeof(T);
  const Strided<const T>& in = s.input;
  const bool aligned = in.at[2] == 1 && s.grid.patch[2] % kPixels == 0 && s.grid.stride[2] % kPixels == 0 &&
                       reinterpret_cast<uintptr_t>(in.data) % 16 == 0 && in.batch % kPixels == 0 &&
                       in.classes % kPixels == 0 && in.at[0] % kPixels == 0 && in.at[1] % kPixels == 0;
  // Vectors of eight 16-bit pixels and eight classes would not fit the registers.
  if (aligned && s.grid.classes <= 4) return body.template operator()<4, kPixels>();
  if (s.grid.classes <= 8) return body.template operator()<8, 1>();
  body.template operator()<0, 1>();
}

inline int64_t statistics_blocks(const StatisticsGrid& g) {
  return (g.batch * g.patches + kStatisticsWarps - 1) / kStatisticsWarps;
}

template <typename T>
void run_statistics_forward(const StatisticsInput<T>& s, const StatisticsOutput<typename Accumulate<T>::type>& out,
                            PglclStream stream) {
  const int64_t blocks = statistics_blocks(s.grid);
  if (blocks == 0) return;
  with_statistics_path(s, [&]<int kHeld, int kPixels>() {
    PGLCL_LAUNCH((patch_statistics_forward<T, kHeld, kPixels>), blocks, 1, kStatisticsThreads,
                 kHeld > 0 ? 0 : kStatisticsShared<typename Accumulate<T>::type>, stream, s, out);
  });
}

// coefficients: memory for (B, K, patches) numbers each, written and read here.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_statistics_backward(const StatisticsInput<T>& s, const Strided<const scalar_t>& grad_entropy,
                             const Strided<const scalar_t>& grad_confidence,
                             const Strided<const scalar_t>& grad_class_entropy,
                             const StatisticsCoefficients<scalar_t>& coefficients, const Strided<T>& grad_input,
                             PglclStream stream) {
  const int64_t blocks = statistics_blocks(s.grid);
  if (blocks == 0) return;
  with_statistics_path(s, [&]<int kHeld, int kPixels>() {
    PGLCL_LAUNCH((patch_statistics_coefficients<T, kHeld, kPixels>), blocks, 1, kStatisticsThreads,
                 kHeld > 0 ? 0 : kStatisticsShared<scalar_t>, stream, s, grad_class_entropy, coefficients);
  });
  const StatisticsGradients<T> grads{
      grad_entropy, grad_confidence, {coefficients.gamma, coefficients.kappa}, grad_input};
  const StatisticsGrid& g = s.grid;
  const int64_t pixels = (g.pixels + kStatisticsThreads - 1) / kStatisticsThreads;
  const int64_t images = g.batch < kMostRowsOfBlocks ? g.batch : kMostRowsOfBlocks;
  const auto launch = [&]<bool kOverlap>() {
    PGLCL_LAUNCH((patch_statistics_backward<T, kOverlap>), pixels, images, kStatisticsThreads, 0, stream, s, grads);
  };
  const auto overlap = [&](int d) { return g.grid[d] > 1 && g.stride[d] < g.patch[d]; };
  if (overlap(0) || overlap(1) || overlap(2))
    launch.template operator()<true>();
  else
    launch.template operator()<false>();
}

}  // namespace pglcl::cuda
