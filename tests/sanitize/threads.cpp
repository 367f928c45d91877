// The schedules of the ops on std::thread, for ThreadSanitizer, which does not know the OpenMP runtime of torch. Each
// runs with one thread and with several: a race is reported, and so is a bit that differs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/gaussian_contrast.h"
#include "../../csrc/cpu/patch_contrast.h"
#include "../../csrc/cpu/patch_statistics.h"
#include "../../csrc/cpu/semantic_disparity.h"

using namespace pglcl;

namespace {

Parallel plain_threads(int threads) {
  return {threads, [](int workers, Parallel::Body body, const void* context) {
            std::vector<std::thread> running;
            for (int worker = 0; worker < workers; ++worker) running.emplace_back(body, context, worker);
            for (auto& thread : running) thread.join();
          }};
}

std::mt19937 random_bits(0);

template <typename scalar_t>
std::vector<scalar_t> normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> draw(0, scale);
  std::vector<scalar_t> values(count);
  for (auto& value : values) value = scalar_t(draw(random_bits));
  return values;
}

std::vector<int64_t> labels(int64_t count, int64_t classes) {
  std::vector<int64_t> values(count);
  for (auto& value : values) value = int64_t(random_bits() % (classes + 1)) - 1;
  return values;
}

template <typename scalar_t>
constexpr DType dtype() {
  return sizeof(scalar_t) == 8 ? DType::kFloat64 : DType::kFloat32;
}

int differences = 0;

// run(parallel) returns every number that the kernel wrote.
template <typename Run>
void same_for_any_number_of_threads(const char* name, Run run) {
  const auto expected = run(plain_threads(1));
  for (int threads : {2, 5}) {
    const auto got = run(plain_threads(threads));
    if (std::memcmp(got.data(), expected.data(), expected.size() * sizeof(expected[0]))) {
      std::printf("%s: other bits with %d threads\n", name, threads);
      ++differences;
    }
  }
  std::printf("%s: %zu numbers\n", name, expected.size());
}

template <typename scalar_t>
void contrast(const char* name, int64_t n, int64_t m) {
  const int64_t depth = 24, keys = m ? m : n;
  const auto z = normal<scalar_t>(n * depth, 0.2), k = normal<scalar_t>(keys * depth, 0.2);
  const auto d = normal<scalar_t>(n), key_d = normal<scalar_t>(keys);
  const auto y = labels(n, 3), key_y = labels(keys, 3);
  ContrastInputs<scalar_t> x{};
  x.anchors = {z.data(), dtype<scalar_t>(), n};
  x.keys = {m ? k.data() : nullptr, dtype<scalar_t>(), keys};
  x.depth = depth;
  x.labels = y.data();
  x.key_labels = m ? key_y.data() : y.data();
  x.descriptors = d.data();
  x.key_descriptors = m ? key_d.data() : d.data();
  x.channels = 1;
  x.positive_bound = scalar_t(1);
  x.negative_bound = scalar_t(0.1);
  x.temperature = 0.1;
  x.negative_weight = 1;
  x.ignore_index = -1;
  x.self_offset = m ? -1 : 0;
  same_for_any_number_of_threads(name, [&](const Parallel& parallel) {
    std::vector<scalar_t> out(4 * n + (n + keys) * depth);
    std::vector<int32_t> positives(n);
    scalar_t *losses = out.data(), *maximum = losses + n, *log_sum = maximum + n, *mean = log_sum + n;
    scalar_t *grad_z = mean + n, *grad_k = grad_z + n * depth;
    patch_contrast_forward<scalar_t>(x, {losses, maximum, log_sum, mean, positives.data()}, parallel);
    const std::vector<scalar_t> rows(n, scalar_t(1));
    patch_contrast_backward<scalar_t>(x, rows.data(), maximum, log_sum, positives.data(), grad_z, m ? grad_k : nullptr,
                                      parallel);
    return out;
  });
}

void statistics() {
  StatisticsInputs x{};
  x.grid = {2, 4, {1, 45, 50}, {1, 8, 8}, {1, 5, 5}, {1, 8, 9}};
  const auto logits = normal<float>(x.grid.batch * x.grid.classes * x.grid.pixels());
  x.input = logits.data();
  x.dtype = DType::kFloat32;
  const int64_t patches = x.grid.batch * x.grid.patches();
  same_for_any_number_of_threads("statistics", [&](const Parallel& parallel) {
    std::vector<float> out(patches * (1 + 2 * x.grid.classes));
    float *confidence = out.data() + patches, *class_entropy = confidence + patches * x.grid.classes;
    patch_statistics_forward<float>(x, {out.data(), confidence, class_entropy, DType::kFloat32}, parallel);
    return out;
  });
}

void disparity() {
  const int64_t n = 150, m = 170, channels = 3;
  const auto a = normal<float>(n * channels), b = normal<float>(m * channels), grad = normal<float>(n * m);
  const auto y = labels(n, 3), key_y = labels(m, 3);
  same_for_any_number_of_threads("disparity", [&](const Parallel& parallel) {
    std::vector<float> out(n * m + (n + m) * channels + n);
    float *grad_a = out.data() + n * m, *grad_b = grad_a + n * channels, *bounds = grad_b + m * channels;
    semantic_disparity_forward<float>(a.data(), n, b.data(), m, channels, out.data(), parallel);
    semantic_disparity_backward<float>(grad.data(), a.data(), n, b.data(), m, channels, grad_a, grad_b, parallel);
    disparity_bounds<float>({a.data(), b.data(), y.data(), key_y.data(), n, m, channels, 5, -1, -1, true}, bounds,
                            parallel);
    return out;
  });
}

void gaussian() {
  const int64_t n = 200, depth = 20, classes = 4;
  const auto t = normal<float>(n * depth, 0.2), means = normal<float>(classes * depth, 0.2);
  const auto covariances = normal<float>(classes * depth * depth, 0.01);
  const auto y = labels(n, classes);
  const std::vector<int64_t> counts{3, 0, 5, 7};
  GaussianInputs<float> x{};
  x.anchors = t.data();
  x.dtype = DType::kFloat32;
  x.n = n, x.depth = depth, x.classes = classes;
  x.labels = y.data(), x.means = means.data(), x.covariances = covariances.data(), x.counts = counts.data();
  x.temperature = 0.2, x.covariance_scale = 4, x.negative_weight = 4096, x.ignore_index = -1;
  same_for_any_number_of_threads("gaussian", [&](const Parallel& parallel) {
    std::vector<float> out(n + n * depth);
    gaussian_contrast<float>(x, out.data(), out.data() + n, parallel);
    return out;
  });
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    setenv("PGLCL_CPU_ISA", isa, 1);
    contrast<float>("contrast", 400, 0);
    contrast<float>("contrast with keys", 300, 350);
    contrast<double>("contrast, float64", 200, 0);
    statistics();
    disparity();
    gaussian();
  }
  std::printf("%d differences\n", differences);
  return differences ? 1 : 0;
}
