// Patch statistics on the GPU (METHOD section 2). One warp per patch: its lanes walk the pixels of the patch, and what
// they add up meets in warp reductions; there is no shared memory and no atomic.
#pragma once

#include "../../shared/patch_grid.h"
#include "device.h"

namespace pglcl::cuda {

constexpr int kStatisticsThreads = 128;  // four patches per block

PGLCL_DEVICE float natural_log(float x) { return logf(x); }
PGLCL_DEVICE double natural_log(double x) { return log(x); }
PGLCL_DEVICE float natural_exp(float x) { return expf(x); }
PGLCL_DEVICE double natural_exp(double x) { return exp(x); }

template <typename scalar_t>
PGLCL_DEVICE scalar_t p_log_p(scalar_t p) {
  return p <= scalar_t(0) ? scalar_t(0) : p * natural_log(p);
}

// What the softmax of one pixel needs: found in one pass over its classes.
template <typename scalar_t>
struct PixelSoftmax {
  scalar_t highest, sum, weighted;  // max, sum of e^(l - max), sum of (l - max) e^(l - max)

  PGLCL_DEVICE scalar_t entropy() const {
    const scalar_t h = natural_log(sum) - weighted / sum;
    return h < scalar_t(0) ? scalar_t(0) : h;  // rounding; NaN stays
  }
};

// Reads up to kHeld classes of kPixels neighbours into registers: 16-byte loads where kPixels asks for them.
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

// Turns the values of one pixel into probabilities and returns its entropy.
template <typename scalar_t, int kPixels, int kHeld>
PGLCL_DEVICE scalar_t softmax_in_place(scalar_t (&values)[kHeld][kPixels], int i, int classes, bool probabilities) {
  if (probabilities) {
    scalar_t h = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (k < classes) h -= p_log_p(values[k][i]);
    return h;
  }
  PixelSoftmax<scalar_t> softmax{values[0][i], 0, 0};
#pragma unroll
  for (int k = 1; k < kHeld; ++k)
    if (k < classes && !(values[k][i] <= softmax.highest)) softmax.highest = values[k][i];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= classes) break;
    const scalar_t centred = values[k][i] - softmax.highest;
    const scalar_t e = natural_exp(centred);
    softmax.sum += e;
    softmax.weighted += e * centred;
    values[k][i] = e;
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (k < classes) values[k][i] /= softmax.sum;
  return softmax.entropy();
}

// The entropy of one pixel with any number of classes, and its softmax for reading probabilities one by one.
template <typename T, typename scalar_t>
PGLCL_DEVICE scalar_t scan_pixel(Global<const T> input, int64_t at, int64_t class_stride, int classes,
                                 bool probabilities, PixelSoftmax<scalar_t>& softmax) {
  softmax = {widen(input.load(at)), 0, 0};
  if (probabilities) {
    scalar_t h = 0;
    for (int k = 0; k < classes; ++k) h -= p_log_p(scalar_t(widen(input.load(at + k * class_stride))));
    return h;
  }
  for (int k = 1; k < classes; ++k) {
    const scalar_t l = widen(input.load(at + k * class_stride));
    if (!(l <= softmax.highest)) softmax.highest = l;
  }
  for (int k = 0; k < classes; ++k) {
    const scalar_t centred = scalar_t(widen(input.load(at + k * class_stride))) - softmax.highest;
    const scalar_t e = natural_exp(centred);
    softmax.sum += e;
    softmax.weighted += e * centred;
  }
  return softmax.entropy();
}

// Writes the statistics of one class from what the warp has summed.
template <typename T, typename scalar_t>
PGLCL_DEVICE void write_class(Global<T> confidence, Global<T> class_entropy, int64_t at, scalar_t mass,
                              scalar_t product, scalar_t pixels, scalar_t scale, scalar_t highest) {
  scalar_t h = mass == scalar_t(0) ? scalar_t(0) : product / mass * scale;
  if (h > highest) h = highest;
  confidence.store(at, narrow<T>(mass / pixels));
  class_entropy.store(at, narrow<T>(h));
}

// kHeld: classes held in registers, so that every logit is read once (0: any number, read again class by class).
// kPixels: neighbours along a row that one lane reads at once; patch width, stride and image width are multiples of it.
template <typename T, int kHeld, int kPixels>
PGLCL_KERNEL patch_statistics_forward(const T* input_data, T* entropy_data, T* confidence_data, T* class_entropy_data,
                                      PatchGrid g, bool probabilities, bool normalize, double log_classes) {
  using scalar_t = typename Accumulate<T>::type;
  const Global<const T> input(input_data);
  const Global<T> entropy(entropy_data), confidence(confidence_data), class_entropy(class_entropy_data);
  const int lane = thread_index() % 32;
  const int64_t patch = int64_t(block_index()) * (kStatisticsThreads / 32) + thread_index() / 32;
  const int64_t patches = g.patches();
  if (patch >= g.batch * patches) return;  // the whole warp

  const int64_t b = patch / patches, j = patch % patches;
  const int64_t gz = j / (g.grid[1] * g.grid[2]), gy = j / g.grid[2] % g.grid[1], gx = j % g.grid[2];
  const int64_t pixels = g.pixels(), row = g.image[2];
  const int64_t origin =
      b * g.classes * pixels + gz * g.stride[0] * g.image[1] * row + gy * g.stride[1] * row + gx * g.stride[2];
  const int classes = int(g.classes);
  const int64_t per_row = g.patch[2] / kPixels;
  const int64_t steps = g.patch[0] * g.patch[1] * per_row;
  const scalar_t count = scalar_t(g.patch_pixels());
  const scalar_t scale = normalize ? scalar_t(1 / log_classes) : scalar_t(1);
  const scalar_t highest = probabilities ? scalar_t(INFINITY) : normalize ? scalar_t(1) : scalar_t(log_classes);
  scalar_t total = 0;

  if constexpr (kHeld > 0) {
    scalar_t mass[kHeld] = {}, product[kHeld] = {};
    for (int64_t step = lane; step < steps; step += 32) {
      const int64_t x = step % per_row * kPixels, y = step / per_row % g.patch[1], z = step / per_row / g.patch[1];
      scalar_t values[kHeld][kPixels];
      read_pixels<T, kPixels>(input, origin + (z * g.image[1] + y) * row + x, pixels, classes, values);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const scalar_t h = softmax_in_place(values, i, classes, probabilities);
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
      if (lane == 0)
        write_class(confidence, class_entropy, (b * classes + k) * patches + j, m, q, count, scale, highest);
    }
  } else {
    for (int k = 0; k < classes; ++k) {
      scalar_t mass = 0, product = 0;
      for (int64_t step = lane; step < steps; step += 32) {
        const int64_t x = step % per_row, y = step / per_row % g.patch[1], z = step / per_row / g.patch[1];
        const int64_t at = origin + (z * g.image[1] + y) * row + x;
        PixelSoftmax<scalar_t> softmax;
        const scalar_t h = scan_pixel<T>(input, at, pixels, classes, probabilities, softmax);
        const scalar_t value = widen(input.load(at + k * pixels));
        const scalar_t p = probabilities ? value : natural_exp(value - softmax.highest) / softmax.sum;
        if (k == 0) total += h;
        mass += p;
        product += p * h;
      }
      mass = warp_sum(mass);
      product = warp_sum(product);
      if (lane == 0)
        write_class(confidence, class_entropy, (b * classes + k) * patches + j, mass, product, count, scale, highest);
    }
  }
  total = warp_sum(total);
  if (lane == 0) {
    scalar_t h = total / count * scale;
    if (h > highest) h = highest;
    entropy.store(b * patches + j, narrow<T>(h));
  }
}

// One thread per pixel gathers the coefficients of the patches that hold it (see StatisticsGradientStrip), so that
// nothing is scattered.
template <typename T>
PGLCL_KERNEL patch_statistics_backward(const T* input_data, const T* confidence_data, const T* class_entropy_data,
                                       const T* grad_entropy_data, const T* grad_confidence_data,
                                       const T* grad_class_entropy_data, T* grad_input_data, PatchGrid g,
                                       bool probabilities, bool normalize, double log_classes) {
  using scalar_t = typename Accumulate<T>::type;
  const Global<const T> input(input_data), confidence(confidence_data), class_entropy(class_entropy_data);
  const Global<const T> grad_entropy(grad_entropy_data), grad_confidence(grad_confidence_data);
  const Global<const T> grad_class_entropy(grad_class_entropy_data);
  const Global<T> grad_input(grad_input_data);
  const int64_t pixels = g.pixels(), patches = g.patches();
  const int64_t id = int64_t(block_index()) * block_threads() + thread_index();
  if (id >= g.batch * pixels) return;

  const int64_t b = id / pixels, at_pixel = id % pixels;
  const int64_t at = b * g.classes * pixels + at_pixel;
  const PatchRange xs = patches_with(at_pixel % g.image[2], g.patch[2], g.stride[2], g.grid[2]);
  const PatchRange ys = patches_with(at_pixel / g.image[2] % g.image[1], g.patch[1], g.stride[1], g.grid[1]);
  const PatchRange zs = patches_with(at_pixel / g.image[2] / g.image[1], g.patch[0], g.stride[0], g.grid[0]);
  const int classes = int(g.classes);
  const scalar_t scale = normalize ? scalar_t(1 / log_classes) : scalar_t(1);
  const scalar_t per_pixel = scalar_t(1) / scalar_t(g.patch_pixels());

  PixelSoftmax<scalar_t> softmax;
  const scalar_t h = scan_pixel<T>(input, at, pixels, classes, probabilities, softmax);
  const scalar_t log_sum = probabilities ? scalar_t(0) : natural_log(softmax.sum) + softmax.highest;

  // beta_k + gamma_k h, and gamma_k alone, summed over the patches of this pixel.
  const auto coefficients = [&](int k, scalar_t& gamma) {
    scalar_t beta = 0;
    gamma = 0;
    for (int64_t z = zs.first; z < zs.last; ++z)
      for (int64_t y = ys.first; y < ys.last; ++y)
        for (int64_t x = xs.first; x < xs.last; ++x) {
          const int64_t j = (b * classes + k) * patches + (z * g.grid[1] + y) * g.grid[2] + x;
          const scalar_t mass = widen(confidence.load(j));
          const scalar_t upstream = widen(grad_class_entropy.load(j));
          const scalar_t share = mass == scalar_t(0) ? scalar_t(0) : upstream / mass * per_pixel;
          gamma += share * scale;
          beta += scalar_t(widen(grad_confidence.load(j))) * per_pixel - share * scalar_t(widen(class_entropy.load(j)));
        }
    return beta + gamma * h;
  };

  scalar_t dh = 0, dp_mean = 0;
  for (int64_t z = zs.first; z < zs.last; ++z)
    for (int64_t y = ys.first; y < ys.last; ++y)
      for (int64_t x = xs.first; x < xs.last; ++x)
        dh += scalar_t(widen(grad_entropy.load(b * patches + (z * g.grid[1] + y) * g.grid[2] + x))) * per_pixel * scale;
  for (int k = 0; k < classes; ++k) {
    const scalar_t value = widen(input.load(at + k * pixels));
    const scalar_t p = probabilities ? value : natural_exp(value - log_sum);
    scalar_t gamma;
    const scalar_t dp = coefficients(k, gamma);
    dh += gamma * p;
    dp_mean += dp * p;
  }
  for (int k = 0; k < classes; ++k) {
    const scalar_t value = widen(input.load(at + k * pixels));
    scalar_t gamma, gradient;
    const scalar_t dp = coefficients(k, gamma);
    if (probabilities) {
      gradient = dp + (value <= scalar_t(0) ? scalar_t(0) : -dh * (natural_log(value) + scalar_t(1)));
    } else {
      const scalar_t log_p = value - log_sum;
      gradient = natural_exp(log_p) * (dp - dp_mean - dh * (log_p + h));
    }
    grad_input.store(at + k * pixels, narrow<T>(gradient));
  }
}

// --- launches
// -------------------------------------------------------------------------------------------------------------

template <typename T>
struct StatisticsForward {
  const T* input;
  T *entropy, *confidence, *class_entropy;
  PatchGrid grid;
  bool probabilities, normalize;
  double log_classes;
};

template <typename T, int kHeld, int kPixels>
void launch_statistics_forward(const StatisticsForward<T>& x, PglclStream stream) {
  const int64_t patches = x.grid.batch * x.grid.patches();
  const int64_t blocks = (patches + kStatisticsThreads / 32 - 1) / (kStatisticsThreads / 32);
  if (blocks == 0) return;
  PGLCL_LAUNCH((patch_statistics_forward<T, kHeld, kPixels>), blocks, 1, kStatisticsThreads, 0, stream, x.input,
               x.entropy, x.confidence, x.class_entropy, x.grid, x.probabilities, x.normalize, x.log_classes);
}

template <typename T>
void run_statistics_forward(const StatisticsForward<T>& x, PglclStream stream) {
  // 16-byte loads need rows, patches and strides that are multiples of them.
  constexpr int kPixels = 16 / sizeof(T);
  const bool aligned = x.grid.image[2] % kPixels == 0 && x.grid.patch[2] % kPixels == 0 &&
                       x.grid.stride[2] % kPixels == 0 && reinterpret_cast<uintptr_t>(x.input) % 16 == 0;
  const int64_t classes = x.grid.classes;
  // Vectors of eight 16-bit pixels and eight classes would not fit the registers.
  if (aligned && classes <= 4) return launch_statistics_forward<T, 4, kPixels>(x, stream);
  if (classes <= 8) return launch_statistics_forward<T, 8, 1>(x, stream);
  launch_statistics_forward<T, 0, 1>(x, stream);
}

template <typename T>
struct StatisticsBackward {
  const T *input, *confidence, *class_entropy, *grad_entropy, *grad_confidence, *grad_class_entropy;
  T* grad_input;
  PatchGrid grid;
  bool probabilities, normalize;
  double log_classes;
};

template <typename T>
void run_statistics_backward(const StatisticsBackward<T>& x, PglclStream stream) {
  const int64_t blocks = (x.grid.batch * x.grid.pixels() + kStatisticsThreads - 1) / kStatisticsThreads;
  if (blocks == 0) return;
  PGLCL_LAUNCH(patch_statistics_backward<T>, blocks, 1, kStatisticsThreads, 0, stream, x.input, x.confidence,
               x.class_entropy, x.grad_entropy, x.grad_confidence, x.grad_class_entropy, x.grad_input, x.grid,
               x.probabilities, x.normalize, x.log_classes);
}

}  // namespace pglcl::cuda
