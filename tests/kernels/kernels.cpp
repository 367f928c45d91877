// The schedules of the ops and the kernels below them, without torch, on std::thread.
//
//   kernels                     every op in every instruction set that the processor has: with one thread and several,
//                               which must give the same bits, and against plain loops in double (plain.h). Under
//                               ThreadSanitizer, which does not know the OpenMP runtime of torch, a race is reported.
//   kernels OP WHAT REPEATS     one op REPEATS times, in the instruction set WHAT or, where it is `plain`, in plain
//                               loops of float: what tests/kernels/instructions.c counts. OP: see main.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/gaussian_contrast.h"
#include "../../csrc/cpu/isa/kernel_table.h"
#include "../../csrc/cpu/patch_contrast.h"
#include "../../csrc/cpu/patch_statistics.h"
#include "../../csrc/cpu/semantic_disparity.h"
#include "plain.h"

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
std::vector<double> wide(const std::vector<scalar_t>& values) {
  return {values.begin(), values.end()};
}

template <typename scalar_t>
constexpr ScalarType dtype() {
  return sizeof(scalar_t) == 8 ? ScalarType::Double : ScalarType::Float;
}

int differences = 0;

// Numbers agree to a share of the largest that was expected.
template <typename scalar_t>
void compare(const char* name, const std::vector<scalar_t>& got, const std::vector<double>& expected) {
  double largest = 0, worst = 0;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(double(got[i]) - expected[i]) / largest;
    if (!(error <= worst)) worst = error;
  }
  const bool same = got.size() == expected.size() && worst <= (sizeof(scalar_t) == 8 ? 1e-12 : 2e-5);
  std::printf("%s: %zu numbers, off by %.1e of the largest%s\n", name, got.size(), worst, same ? "" : ": TOO MUCH");
  differences += !same;
}

// run(parallel) returns every number that the kernel wrote.
template <typename Run>
void check(const char* name, Run run, const std::vector<double>& plain) {
  const auto expected = run(plain_threads(1));
  for (int threads : {2, 5}) {
    const auto got = run(plain_threads(threads));
    if (std::memcmp(got.data(), expected.data(), expected.size() * sizeof(expected[0]))) {
      std::printf("%s: other bits with %d threads\n", name, threads);
      ++differences;
    }
  }
  compare(name, expected, plain);
}

// --- the ops, each as numbers of the kernels and of plain loops

template <typename scalar_t>
struct Contrast {
  int64_t n, m, depth;  // m: 0 where the anchors are the keys
  int64_t keys = m ? m : n;
  std::vector<scalar_t> z = normal<scalar_t>(n * depth, 1 / std::sqrt(double(depth)));
  std::vector<scalar_t> k = m ? normal<scalar_t>(m * depth, 1 / std::sqrt(double(depth))) : z;
  std::vector<scalar_t> d = normal<scalar_t>(n), key_d = m ? normal<scalar_t>(m) : d;
  std::vector<int64_t> y = labels(n, 3), key_y = m ? labels(m, 3) : y;

  ContrastInputs<scalar_t> inputs() const {
    ContrastInputs<scalar_t> x{};
    x.anchors = {z.data(), dtype<scalar_t>(), n};
    x.keys = {m ? k.data() : nullptr, dtype<scalar_t>(), keys};
    x.depth = depth;
    x.labels = y.data(), x.key_labels = key_y.data();
    x.descriptors = d.data(), x.key_descriptors = key_d.data();
    x.channels = 1;
    x.positive_bound = scalar_t(1), x.negative_bound = scalar_t(0.1);
    x.temperature = 0.1, x.negative_weight = 1;
    x.ignore_index = -1;
    x.self_offset = m ? -1 : 0;
    return x;
  }

  // The losses, and the gradients of their sum unless `forward` only.
  std::vector<scalar_t> run(const Parallel& parallel, bool forward = false) const {
    std::vector<scalar_t> out(n + (forward ? 0 : (m ? n + m : n) * depth)), saved(3 * n);
    scalar_t *maximum = saved.data(), *log_sum = maximum + n, *grad_z = out.data() + n;
    std::vector<int32_t> positives(n);
    patch_contrast_forward<scalar_t>(inputs(), {out.data(), maximum, log_sum, log_sum + n, positives.data()}, parallel);
    const std::vector<scalar_t> rows(n, scalar_t(1));
    if (!forward)
      patch_contrast_backward<scalar_t>(inputs(), rows.data(), maximum, log_sum, positives.data(), grad_z,
                                        m ? grad_z + n * depth : nullptr, parallel);
    return out;
  }

  template <typename plain_t>
  std::vector<plain_t> plain_loops(bool forward = false) const {
    const std::vector<plain_t> a(z.begin(), z.end()), b(k.begin(), k.end());
    const std::vector<plain_t> h(d.begin(), d.end()), key_h(key_d.begin(), key_d.end());
    const plain::Contrast<plain_t> x{{a.data(), h.data(), y.data(), n},
                                     {b.data(), key_h.data(), key_y.data(), keys},
                                     depth,
                                     m == 0,
                                     plain_t(0.1),
                                     plain_t(scalar_t(1)),
                                     plain_t(scalar_t(0.1)),
                                     -1};
    std::vector<plain_t> out(n + (m ? n + m : n) * depth);
    plain_t* gradient = out.data() + n;
    plain::contrast<plain_t>(x, out.data(), forward ? nullptr : gradient, m ? gradient + n * depth : gradient);
    return out;
  }
};

struct Statistics {
  plain::Grid grid;
  std::vector<float> logits = normal<float>(grid.classes * grid.height * grid.width, 2);
  std::vector<float> upstream = normal<float>((1 + 2 * grid.classes) * grid.patches());

  // Entropy, confidence, class entropy, and the gradient unless `forward` only.
  std::vector<float> run(const Parallel& parallel, bool forward = false) const {
    StatisticsInputs x{};
    x.grid = {1,
              grid.classes,
              {1, grid.height, grid.width},
              {1, grid.patch, grid.patch},
              {1, grid.stride, grid.stride},
              {1, grid.rows(), grid.columns()}};
    x.input = logits.data();
    x.dtype = ScalarType::Float;
    const int64_t patches = grid.patches(), all = grid.classes * patches;
    std::vector<float> out(patches + 2 * all + (forward ? 0 : logits.size()));
    float *confidence = out.data() + patches, *class_entropy = confidence + all;
    const float* g = upstream.data();
    patch_statistics_forward<float>(x, {out.data(), confidence, class_entropy}, parallel);
    if (!forward)
      patch_statistics_backward<float>(x, confidence, class_entropy, {g, g + patches, g + patches + all},
                                       class_entropy + all, parallel);
    return out;
  }

  template <typename plain_t>
  std::vector<plain_t> plain_loops(bool forward = false) const {
    const std::vector<plain_t> input(logits.begin(), logits.end()), g(upstream.begin(), upstream.end());
    const int64_t patches = grid.patches(), all = grid.classes * patches;
    std::vector<plain_t> out(patches + 2 * all + (forward ? 0 : logits.size()));
    plain_t *confidence = out.data() + patches, *class_entropy = confidence + all;
    plain::statistics<plain_t>(grid, input.data(), out.data(), confidence, class_entropy);
    if (!forward)
      plain::statistics_gradient<plain_t>(grid, input.data(), confidence, class_entropy, g.data(), g.data() + patches,
                                          g.data() + patches + all, class_entropy + all);
    return out;
  }
};

struct Gaussian {
  int64_t n, depth, classes = 4;
  std::vector<float> t = normal<float>(n * depth, 1 / std::sqrt(double(depth)));
  std::vector<float> means = normal<float>(classes * depth, 0.2);
  std::vector<float> covariances = normal<float>(classes * depth * depth, 0.01);
  std::vector<int64_t> y = labels(n, classes), counts{3, 0, 5, 7};

  std::vector<float> run(const Parallel& parallel) const {
    GaussianInputs<float> x{};
    x.anchors = t.data();
    x.dtype = ScalarType::Float;
    x.n = n, x.depth = depth, x.classes = classes;
    x.labels = y.data(), x.means = means.data(), x.covariances = covariances.data(), x.counts = counts.data();
    x.temperature = 0.2, x.covariance_scale = 4, x.negative_weight = 4096, x.ignore_index = -1;
    std::vector<float> out(n + n * depth);
    gaussian_contrast<float>(x, out.data(), out.data() + n, parallel);
    return out;
  }

  template <typename plain_t>
  std::vector<plain_t> plain_loops() const {
    const std::vector<plain_t> a(t.begin(), t.end()), mean(means.begin(), means.end());
    std::vector<plain_t> covariance(covariances.begin(), covariances.end());
    for (int64_t i = 0; i < classes * depth * depth; ++i) {
      const int64_t row = i / depth % depth, column = i % depth, transposed = i + (column - row) * (depth - 1);
      covariance[i] = (plain_t(covariances[i]) + plain_t(covariances[transposed])) / 2;
    }
    std::vector<plain_t> out(n + n * depth);
    plain::gaussian<plain_t>({a.data(), mean.data(), covariance.data(), y.data(), counts.data(), n, depth, classes,
                              plain_t(0.2), plain_t(4), plain_t(4096)},
                             out.data(), out.data() + n);
    return out;
  }
};

void disparity() {
  const int64_t n = 150, m = 170, channels = 3;
  const auto a = normal<float>(n * channels), b = normal<float>(m * channels), grad = normal<float>(n * m);
  const auto y = labels(n, 3), key_y = labels(m, 3);
  std::vector<double> plain(n * m + (n + m) * channels);
  double *plain_a = plain.data() + n * m, *plain_b = plain_a + n * channels;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < channels; ++c) {
        const double difference = double(a[i * channels + c]) - double(b[j * channels + c]);
        const double slope = grad[i * m + j] * double((difference > 0) - (difference < 0)) / channels;
        plain[i * m + j] += std::abs(difference) / channels;
        plain_a[i * channels + c] += slope;
        plain_b[j * channels + c] -= slope;
      }
  const auto run = [&](const Parallel& parallel) {
    std::vector<float> out(n * m + (n + m) * channels);
    float *grad_a = out.data() + n * m, *grad_b = grad_a + n * channels;
    semantic_disparity_forward<float>(a.data(), n, b.data(), m, channels, out.data(), parallel);
    semantic_disparity_backward<float>(grad.data(), a.data(), n, b.data(), m, channels, grad_a, grad_b, parallel);
    return out;
  };
  check("disparity", run, plain);

  std::vector<double> plain_bounds(n, INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<float> found;
    for (int64_t j = 0; j < m; ++j) {
      float sum = 0;
      for (int64_t c = 0; c < channels; ++c) sum += std::abs(a[i * channels + c] - b[j * channels + c]);
      if (key_y[j] == y[i] && y[i] != -1) found.push_back(sum / channels);
    }
    std::sort(found.begin(), found.end());
    plain_bounds[i] = found.size() > 5 ? found[4] : 0;
  }
  const auto bounds = [&](const Parallel& parallel) {
    std::vector<float> out(n);
    disparity_bounds<float>({a.data(), b.data(), y.data(), key_y.data(), n, m, channels, 5, -1, -1, true}, out.data(),
                            parallel);
    for (float& bound : out) bound = std::isinf(bound) ? 0 : bound;
    return out;
  };
  check("bounds", bounds, plain_bounds);
}

template <typename Op>
void check(const char* name, const Op& op) {
  check(name, [&](const Parallel& parallel) { return op.run(parallel); }, op.template plain_loops<double>());
}

int check_all() {
  for (int level = 0; instruction_set(level); ++level) {
    setenv("PGLCL_CPU_ISA", instruction_set(level), 1);
    if (std::strcmp(kernel_table().name, instruction_set(level))) continue;  // this processor does not have it
    std::printf("--- %s\n", instruction_set(level));
    check("contrast", Contrast<float>{400, 0, 24});
    check("contrast with keys", Contrast<float>{300, 350, 24});
    check("contrast, float64", Contrast<double>{200, 0, 24});
    check("contrast of one tile, float64, with keys", Contrast<double>{33, 65, 7});
    check("statistics", Statistics{{4, 45, 50, 8, 5}});
    check("statistics of seven classes", Statistics{{7, 41, 47, 8, 8}});
    check("gaussian", Gaussian{200, 20});
    disparity();
  }
  std::printf("%d differences\n", differences);
  return differences ? 1 : 0;
}

// --- one op again and again

// Of this thread on a processor.
double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

template <typename Op, typename... Forward>
void repeat(const Op& op, const std::string& what, int repeats, Forward... forward) {
  if (what != "plain") setenv("PGLCL_CPU_ISA", what.c_str(), 1);
  double total = 0, best = INFINITY;
  for (int i = 0; i < repeats; ++i) {
    const double start = seconds();
    total += double(what == "plain" ? op.template plain_loops<float>(forward...)[0]
                                    : op.run(plain_threads(1), forward...)[0]);
    best = std::min(best, seconds() - start);
  }
  std::printf("%.1f us at best; %g\n", 1e6 * best, total);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) return check_all();
  const std::string op = arguments[1], what = count > 2 ? arguments[2] : "";
  const int repeats = count > 3 ? std::atoi(arguments[3]) : 1;
  // Keys are given, so that both sides make the same products.
  const std::map<std::string, std::function<void()>> ops{
      {"contrast", [&] { repeat(Contrast<float>{256, 256, 128}, what, repeats, true); }},
      {"contrast+gradient", [&] { repeat(Contrast<float>{256, 256, 128}, what, repeats, false); }},
      {"large contrast", [&] { repeat(Contrast<float>{2048, 0, 128}, what, repeats, true); }},
      {"large contrast+gradient", [&] { repeat(Contrast<float>{2048, 0, 128}, what, repeats, false); }},
      {"small contrast", [&] { repeat(Contrast<float>{32, 0, 128}, what, repeats, true); }},
      {"small contrast+gradient", [&] { repeat(Contrast<float>{32, 0, 128}, what, repeats, false); }},
      {"statistics", [&] { repeat(Statistics{{4, 128, 128, 16, 16}}, what, repeats, true); }},
      {"statistics+gradient", [&] { repeat(Statistics{{4, 128, 128, 16, 16}}, what, repeats, false); }},
      {"gaussian", [&] { repeat(Gaussian{128, 128}, what, repeats); }}};
  const auto found = ops.find(op);
  if (found == ops.end()) {
    std::fprintf(stderr, "kernels: no op %s\n", op.c_str());
    return 2;
  }
  found->second();
}
