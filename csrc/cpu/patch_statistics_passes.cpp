// Both passes of the patch statistics over strips of image rows (method, section 2).
#include "patch_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "isa/kernel_table.h"

namespace pglcl {
namespace {

// For fewer pixels times classes, a second thread takes more time than it saves.
constexpr int64_t kSerialWork = 1 << 14;

// A class with less probability than this in a whole patch counts as absent, since its digits are lost.
template <typename scalar_t>
constexpr scalar_t kLeastMass = std::numeric_limits<scalar_t>::min();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest coefficient from a patch to a pixel. It grows like 1 over the class's probability, and is multiplied by
// an entropy and added up over the patches that hold the pixel. Larger coefficients are dropped.
template <typename scalar_t>
double largest_share(const PatchGrid& g) {
  double patches = 1;
  for (int d = 0; d < 3; ++d) patches *= double(std::min(ceil_div(g.patch[d], g.stride[d]), g.grid[d]));
  return double(std::numeric_limits<scalar_t>::max()) / (64 * patches);
}

Element element_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Element::kBFloat16;
  return dtype == ScalarType::Half ? Element::kFloat16 : Element::kAsComputed;
}

// The index of the first element of row y of slice z of image b.
int64_t row_at(const PatchGrid& g, int64_t b, int64_t z, int64_t y) {
  return b * g.classes * g.pixels() + (z * g.image[1] + y) * g.image[2];
}

// Positions [first, last) along one dimension of the patches that hold pixel x; empty between and past patches.
struct PatchRange {
  int64_t first, last;
};

PatchRange patches_with(int64_t x, int64_t patch, int64_t stride, int64_t grid) {
  const int64_t first = x < patch ? 0 : (x - patch) / stride + 1;
  const int64_t last = x / stride + 1;
  return {first, last < grid ? last : grid};
}

// The first image row after y that lies in other patches than y does, or `end`.
int64_t next_change(int64_t y, int64_t end, int64_t patch, int64_t stride, int64_t grid) {
  const PatchRange range = patches_with(y, patch, stride, grid);
  int64_t next = end;
  if (range.first < range.last) next = std::min(next, range.first * stride + patch);  // the first patch ends
  if (range.last < grid) next = std::min(next, range.last * stride);                  // the next one begins
  return next;
}

}  // namespace

template <typename scalar_t>
void patch_statistics_forward(const StatisticsInputs& inputs, const StatisticsOutputs<scalar_t>& out,
                              const Parallel& parallel) {
  const PatchGrid& g = inputs.grid;
  const int64_t width = g.image[2], classes = g.classes, size = size_of(inputs.dtype);
  const char* image = static_cast<const char*>(inputs.input);
  const auto forward_strip = kernel_table().statistics<scalar_t>().forward_strip;
  const double log_classes = std::log(double(classes));
  const scalar_t scale = scalar_t(inputs.normalize ? 1.0 / log_classes : 1.0);
  const scalar_t highest = inputs.probabilities ? scalar_t(INFINITY) : scalar_t(inputs.normalize ? 1.0 : log_classes);

  // One task is a run of patch rows; overlapping patches share its image rows, and only its ends are computed twice.
  const int64_t overlap = ceil_div(g.patch[1], g.stride[1]);
  const int64_t run = std::min(g.grid[1], overlap == 1 ? int64_t(1) : 4 * overlap);
  const int64_t runs = ceil_div(g.grid[1], run);
  const int64_t tasks = g.batch * g.grid[0] * runs;

  parallel.share(tasks, g.batch * g.pixels() * classes < kSerialWork, [&](int64_t first_task, int64_t last_task) {
    const int64_t per_row = (1 + 2 * classes) * width;  // entropy, then mass and product of each class
    Buffer<scalar_t> sums(run * per_row), strip(per_row), scratch(statistics_scratch(classes));
    std::vector<scalar_t> values((1 + 2 * classes) * g.grid[2]);

    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t b = task / (g.grid[0] * runs), gz = task / runs % g.grid[0], gy0 = task % runs * run;
      const int64_t gy1 = std::min(gy0 + run, g.grid[1]);
      std::fill(sums.data(), sums.data() + (gy1 - gy0) * per_row, scalar_t(0));

      // Step 1: strips of image rows that lie in the same patches; each is summed once and added to those patches.
      const int64_t end = (gy1 - 1) * g.stride[1] + g.patch[1];
      for (int64_t z = gz * g.stride[0]; z < gz * g.stride[0] + g.patch[0]; ++z) {
        for (int64_t y = gy0 * g.stride[1], next; y < end; y = next) {
          next = next_change(y, end, g.patch[1], g.stride[1], g.grid[1]);
          PatchRange range = patches_with(y, g.patch[1], g.stride[1], g.grid[1]);
          range = {std::max(range.first, gy0), std::min(range.last, gy1)};
          if (range.first >= range.last) continue;
          const bool alone = range.last - range.first == 1;
          scalar_t* into = alone ? sums.data() + (range.first - gy0) * per_row : strip.data();
          if (!alone) std::fill(into, into + per_row, scalar_t(0));
          forward_strip({image + row_at(g, b, z, y) * size, element_of(inputs.dtype), g.pixels(), width, next - y,
                         width, classes, inputs.probabilities, scratch.data(), into, into + width,
                         into + (1 + classes) * width});
          for (int64_t gy = range.first; !alone && gy < range.last; ++gy) {
            scalar_t* patch_row = sums.data() + (gy - gy0) * per_row;
            for (int64_t i = 0; i < per_row; ++i) patch_row[i] += strip[i];
          }
        }
      }

      // Step 2: add up the columns of each patch and divide.
      for (int64_t gy = gy0; gy < gy1; ++gy) {
        const scalar_t* row = sums.data() + (gy - gy0) * per_row;
        for (int64_t line = 0; line < 1 + 2 * classes; ++line) {
          for (int64_t gx = 0; gx < g.grid[2]; ++gx) {
            const scalar_t* first = row + line * width + gx * g.stride[2];
            scalar_t sum = 0;
            for (int64_t x = 0; x < g.patch[2]; ++x) sum += first[x];
            values[line * g.grid[2] + gx] = sum;
          }
        }
        scalar_t* entropies = values.data();
        for (int64_t k = 0; k < classes; ++k) {
          scalar_t* mass = values.data() + (1 + k) * g.grid[2];
          scalar_t* product = mass + classes * g.grid[2];
          for (int64_t gx = 0; gx < g.grid[2]; ++gx) {
            product[gx] = mass[gx] < kLeastMass<scalar_t> ? scalar_t(0) : product[gx] / mass[gx] * scale;
            if (product[gx] > highest) product[gx] = highest;
            mass[gx] /= scalar_t(g.patch_pixels());
          }
          const int64_t at = ((b * classes + k) * g.grid[0] + gz) * g.grid[1] * g.grid[2] + gy * g.grid[2];
          std::copy_n(mass, g.grid[2], out.confidence + at);
          std::copy_n(product, g.grid[2], out.class_entropy + at);
        }
        for (int64_t gx = 0; gx < g.grid[2]; ++gx) {
          entropies[gx] *= scale / scalar_t(g.patch_pixels());
          if (entropies[gx] > highest) entropies[gx] = highest;
        }
        std::copy_n(entropies, g.grid[2], out.entropy + ((b * g.grid[0] + gz) * g.grid[1] + gy) * g.grid[2]);
      }
    }
  });
}

template <typename scalar_t>
void patch_statistics_backward(const StatisticsInputs& inputs, const scalar_t* confidence,
                               const scalar_t* class_entropy, const StatisticsOutputs<const scalar_t>& grads,
                               void* grad_input, const Parallel& parallel) {
  const PatchGrid& g = inputs.grid;
  const int64_t width = g.image[2], classes = g.classes, patches = g.patches(), size = size_of(inputs.dtype);
  const char* image = static_cast<const char*>(inputs.input);
  char* gradient = static_cast<char*>(grad_input);
  const auto backward_strip = kernel_table().statistics<scalar_t>().backward_strip;
  const scalar_t scale = scalar_t(inputs.normalize ? 1.0 / std::log(double(classes)) : 1.0);
  const scalar_t per_pixel = scalar_t(1) / scalar_t(g.patch_pixels());

  // Step 1: the coefficients from each patch to its pixels (see StatisticsGradientStrip).
  const int64_t lines = 1 + 2 * classes;  // alpha, then beta and gamma of each class
  Buffer<scalar_t> coefficients(g.batch * lines * patches);
  parallel.share(g.batch, g.batch * lines * patches < kSerialWork, [&](int64_t first, int64_t last) {
    const int64_t count = classes * patches;
    const double limit = largest_share<scalar_t>(g);
    for (int64_t b = first; b < last; ++b) {
      scalar_t* alpha = coefficients.data() + b * lines * patches;
      scalar_t* beta = alpha + patches;
      scalar_t* gamma = beta + count;
      const scalar_t *mass = confidence + b * count, *h = class_entropy + b * count;  // h comes times `scale`
      const scalar_t *gc = grads.confidence + b * count, *gh = grads.class_entropy + b * count;
      for (int64_t j = 0; j < patches; ++j) alpha[j] = grads.entropy[b * patches + j] * (per_pixel * scale);
      for (int64_t j = 0; j < count; ++j) {
        const double exact = mass[j] <= 0 ? 0.0 : double(gh[j]) / double(mass[j]) * double(per_pixel);
        const scalar_t share = std::abs(exact) > limit ? scalar_t(0) : scalar_t(exact);
        gamma[j] = share * scale;
        beta[j] = gc[j] * per_pixel - share * h[j];
      }
    }
  });

  // Step 2: strips of image rows that lie in the same patches share their coefficients.
  const int64_t run = std::max<int64_t>(g.stride[1], 16);
  const int64_t runs = ceil_div(g.image[1], run);
  const int64_t tasks = g.batch * g.image[0] * runs;
  parallel.share(tasks, g.batch * g.pixels() * classes < kSerialWork, [&](int64_t first_task, int64_t last_task) {
    Buffer<scalar_t> spread(lines * width), scratch(statistics_scratch(classes));
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t b = task / (g.image[0] * runs), z = task / runs % g.image[0], y0 = task % runs * run;
      const PatchRange depth = patches_with(z, g.patch[0], g.stride[0], g.grid[0]);
      const int64_t end = std::min(y0 + run, g.image[1]);
      for (int64_t y = y0, next; y < end; y = next) {
        next = next_change(y, end, g.patch[1], g.stride[1], g.grid[1]);
        const PatchRange height = patches_with(y, g.patch[1], g.stride[1], g.grid[1]);
        std::fill(spread.data(), spread.data() + spread.size(), scalar_t(0));
        for (int64_t line = 0; line < lines; ++line) {
          scalar_t* out = spread.data() + line * width;
          const scalar_t* in = coefficients.data() + (b * lines + line) * patches;
          for (int64_t gz = depth.first; gz < depth.last; ++gz)
            for (int64_t gy = height.first; gy < height.last; ++gy)
              for (int64_t gx = 0; gx < g.grid[2]; ++gx) {
                const scalar_t value = in[(gz * g.grid[1] + gy) * g.grid[2] + gx];
                for (int64_t x = gx * g.stride[2]; x < gx * g.stride[2] + g.patch[2]; ++x) out[x] += value;
              }
        }
        const int64_t at = row_at(g, b, z, y) * size;
        backward_strip({image + at, element_of(inputs.dtype), g.pixels(), width, next - y, width, classes,
                        inputs.probabilities, scratch.data(), spread.data(), spread.data() + width,
                        spread.data() + (1 + classes) * width, gradient + at});
      }
    }
  });
}

#define PGLCL_INSTANTIATE(scalar_t)                                                                             \
  template void patch_statistics_forward<scalar_t>(const StatisticsInputs&, const StatisticsOutputs<scalar_t>&, \
                                                   const Parallel&);                                            \
  template void patch_statistics_backward<scalar_t>(const StatisticsInputs&, const scalar_t*, const scalar_t*,  \
                                                    const StatisticsOutputs<const scalar_t>&, void*, const Parallel&);
PGLCL_INSTANTIATE(float)
PGLCL_INSTANTIATE(double)

}  // namespace pglcl
