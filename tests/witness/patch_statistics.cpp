// Patch statistics and their gradient against docs/method.md, section 2.
#include "brute.h"
// After the shim.
#include "cuda/kernels/patch_statistics.cuh"

namespace witness {
namespace {

struct Grid {
  int64_t classes, height, width, patch_y, patch_x, stride_y, stride_x;
  int64_t rows() const { return (height - patch_y) / stride_y + 1; }
  int64_t columns() const { return (width - patch_x) / stride_x + 1; }
};

// entropy, confidence and class entropy, one after the other.
PGLCL_UNWATCHED Values brute(const Grid& g, const Values& logits) {
  const int64_t pixels = g.height * g.width, patches = g.rows() * g.columns();
  Values out(size_t(patches * (1 + 2 * g.classes)));
  for (int64_t j = 0; j < patches; ++j) {
    Values mass(size_t(g.classes)), product(size_t(g.classes));
    double total = 0;
    for (int64_t y = 0; y < g.patch_y; ++y)
      for (int64_t x = 0; x < g.patch_x; ++x) {
        const int64_t at = (j / g.columns() * g.stride_y + y) * g.width + j % g.columns() * g.stride_x + x;
        double sum = 0, h = 0;
        for (int64_t k = 0; k < g.classes; ++k) sum += std::exp(logits[k * pixels + at]);
        for (int64_t k = 0; k < g.classes; ++k) {
          const double p = std::exp(logits[k * pixels + at]) / sum;
          h -= p * std::log(p);
        }
        total += h;
        for (int64_t k = 0; k < g.classes; ++k) {
          mass[k] += std::exp(logits[k * pixels + at]) / sum;
          product[k] += std::exp(logits[k * pixels + at]) / sum * h;
        }
      }
    const double count = double(g.patch_y * g.patch_x);
    out[j] = total / count;
    for (int64_t k = 0; k < g.classes; ++k) {
      out[patches * (1 + k) + j] = mass[k] / count;
      out[patches * (1 + g.classes + k) + j] = product[k] / mass[k];
    }
  }
  return out;
}

template <typename T>
void statistics(const Grid& g) {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  const int64_t pixels = g.height * g.width, rows = g.rows(), columns = g.columns(), patches = rows * columns;
  const Values start = numbers<T>(g.classes * pixels);
  const std::vector<T> logits = encode<T>(start);
  const pglcl::PatchGrid grid{
      1, g.classes, {1, g.height, g.width}, {1, g.patch_y, g.patch_x}, {1, g.stride_y, g.stride_x}, {1, rows, columns}};
  const pglcl::cuda::Strided<const T> in{logits.data(), g.classes * pixels, pixels, {pixels, g.width, 1}};
  const pglcl::cuda::StatisticsInput<T> input{in, pglcl::cuda::narrowed(grid), false, false,
                                              std::log(double(g.classes))};
  auto out = unwritten<scalar_t>(patches * (1 + 2 * g.classes));
  pglcl::cuda::run_statistics_forward<T>(input,
                                         {out.data(), out.data() + patches, out.data() + patches * (1 + g.classes)}, 0);
  const std::string name = std::string("statistics of ") + Numbers<T>::kName;
  compare(name, decode(out), brute(g, start), Numbers<T>::kTolerance);

  const Values weights = numbers<T>(int64_t(out.size()));
  const std::vector<scalar_t> upstream = encode<scalar_t>(weights);
  const auto gradient_of = [&](int64_t first, bool classes) {
    return pglcl::cuda::Strided<const scalar_t>{
        upstream.data() + first, 0, classes ? patches : 0, {patches, columns, 1}};
  };
  auto coefficients = unwritten<scalar_t>(2 * g.classes * patches);
  auto gradient = unwritten<T>(g.classes * pixels);
  pglcl::cuda::run_statistics_backward<T>(input, gradient_of(0, false), gradient_of(patches, true),
                                          gradient_of(patches * (1 + g.classes), true),
                                          {coefficients.data(), coefficients.data() + g.classes * patches},
                                          {gradient.data(), g.classes * pixels, pixels, {pixels, g.width, 1}}, 0);
  compare(name + ", gradient", decode(gradient),
          differences(
              [&](const Values& v) {
                const Values s = brute(g, v);
                double sum = 0;
                for (size_t i = 0; i < s.size(); ++i) sum += weights[i] * s[i];
                return sum;
              },
              start),
          4 * Numbers<T>::kTolerance);
}

}  // namespace
}  // namespace witness

int main(int count, char** arguments) {
  using namespace witness;
  return run(count, arguments,
             {
                 [] { statistics<float>({9, 7, 6, 3, 3, 2, 2}); },             // 0: any number of classes
                 [] { statistics<float>({3, 9, 8, 4, 3, 3, 2}); },             // 1: held in registers
                 [] { statistics<pglcl::BFloat16>({4, 8, 16, 4, 8, 8, 8}); },  // 2: read by 16 bytes
                 [] { statistics<double>({2, 4, 8, 2, 4, 2, 4}); },            // 3
                 [] { statistics<float>({1100, 2, 2, 2, 2, 2, 2}); },          // 4: two passes over the classes
             });
}
