// Runs every op of the extension, host code and kernels, as CUDA spells them, and compares it with brute force: plain
// loops in float64 over what docs/method.md defines, gradients by central differences. ThreadSanitizer looks on.
//
//   witness FAMILY [BARRIER]     exit status 0: agrees; 1: disagrees. BARRIER is the number of one to leave out.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "cuda_shim.h"

namespace {

using Values = std::vector<double>;
using Named = std::map<std::string, c10::IValue>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls an op with arguments by name; what is not named is None.
Named call(const std::string& op, const Named& arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("pglcl_ext::" + op).c_str(), "");
  torch::jit::Stack stack;
  for (const auto& argument : handle.schema().arguments()) {
    const auto found = arguments.find(argument.name());
    stack.push_back(found == arguments.end() ? c10::IValue() : found->second);
  }
  handle.callBoxed(stack);
  Named results;
  for (size_t i = 0; i < stack.size(); ++i) results[handle.schema().returns()[i].name()] = stack[i];
  return results;
}
Named operator+(Named a, const Named& b) {
  for (const auto& [name, value] : b) a[name] = value;
  return a;
}

Values values(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return Values(wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel());
}

int failures = 0;
void compare(const std::string& what, const at::Tensor& got, const Values& want, double tolerance) {
  const Values have = values(got);
  double scale = 1e-3, worst = 0;
  for (const double v : want)
    if (std::isfinite(v)) scale = std::max(scale, std::fabs(v));
  bool same = have.size() == want.size();
  for (size_t i = 0; same && i < want.size(); ++i) {
    if (have[i] == want[i]) continue;
    const double error = std::fabs(have[i] - want[i]) / scale;
    if (!(error <= worst)) worst = error;
  }
  if (same && worst <= tolerance) return;
  std::printf("%s: off by %g of its largest, %zu numbers for %zu\n", what.c_str(), worst, have.size(), want.size());
  ++failures;
}

__attribute__((no_sanitize("thread"))) Values differences(const std::function<double(const Values&)>& f, Values x) {
  Values gradient(x.size());
  const double step = 1e-5;
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + step;
    const double above = f(x);
    x[i] = at - step;
    gradient[i] = (above - f(x)) / (2 * step);
    x[i] = at;
  }
  return gradient;
}

double tolerance_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return 1e-7;  // of the differences
    case at::kFloat: return 1e-4;
    case at::kBFloat16: return 2e-2;
    default: return 4e-3;
  }
}
at::Tensor numbers(at::IntArrayRef shape, at::ScalarType type, double scale = 1) {
  return (at::randn(shape, at::kDouble) * scale).to(type);
}
at::Tensor integers(int64_t low, int64_t high, int64_t count) { return at::randint(low, high, {count}, at::kLong); }

// --- method, sections 4 and 5
// ---------------------------------------------------------------------------------------------

struct Side {
  int64_t n;
  Values rows, labels, descriptors;
};

__attribute__((no_sanitize("thread"))) double contrast_loss(const Side& a, const Side& b, bool itself, int64_t depth,
                                                            double temperature, double near, double far, double psi) {
  double total = 0;
  int counted = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    double sum = 0, positive = 0;
    int positives = 0;
    for (int64_t j = 0; j < b.n; ++j) {
      if ((itself && i == j) || a.labels[i] == -1 || b.labels[j] == -1) continue;
      double dot = 0;
      for (int64_t d = 0; d < depth; ++d) dot += a.rows[i * depth + d] * b.rows[j * depth + d];
      const double logit = dot / temperature, delta = std::fabs(a.descriptors[i] - b.descriptors[j]);
      if (a.labels[i] == b.labels[j] && delta <= near) {
        sum += std::exp(logit);
        positive += logit;
        ++positives;
      } else if (a.labels[i] != b.labels[j] && delta >= far) {
        sum += psi * std::exp(logit);
      }
    }
    if (positives == 0) continue;
    total += std::log(sum) - positive / positives;
    ++counted;
  }
  return total / std::max(counted, 1);
}

void contrast(at::ScalarType type, int64_t n, int64_t m, int64_t depth, bool tf32) {
  at::globalContext().setAllowTF32CuBLAS(tf32);
  const bool itself = m == 0;
  const double temperature = 0.7, near = 0.6, far = 0.2, psi = 3;
  const auto side = [&](int64_t count, Named& arguments, const std::string& rows, const std::string& prefix) {
    const at::Tensor z = numbers({count, depth}, type, 1 / std::sqrt(double(depth))), y = integers(-1, 3, count);
    const at::Tensor h = at::rand({count}, at::kFloat);
    arguments[rows] = z;
    arguments[prefix + "labels"] = y;
    arguments[prefix + "descriptors"] = h;
    return Side{count, values(z), values(y), values(h)};
  };
  Named x{{"temperature", temperature}, {"positive_bound", near}, {"negative_bound", far}, {"negative_weight", psi},
          {"ignore_index", -1},         {"self_offset", -1},      {"reduction", 1}};
  const Side a = side(n, x, "anchors", ""), b = itself ? a : side(m, x, "keys", "key_");
  const std::string name =
      std::string("contrast of ") + c10::toString(type) + (itself ? ", self" : ", keys") + (tf32 ? ", TF32" : "");
  const double tolerance = tf32 ? 4e-3 : tolerance_of(type);
  const Named out = call("patch_contrast", x);
  const auto loss = [&](const Side& one, const Side& two) {
    return contrast_loss(one, two, itself, depth, temperature, near, far, psi);
  };
  compare(name + ", loss", out.at("loss").toTensor(), {loss(a, b)}, tolerance);
  const at::Tensor grad = at::ones({}, out.at("loss").toTensor().options());
  const Named back = call("patch_contrast_backward",
                          x + out + Named{{"grad", grad}, {"needs_anchors", true}, {"needs_keys", !itself}});
  compare(name + ", gradient of anchors", back.at("grad_anchors").toTensor(),
          differences(
              [&](const Values& v) {
                const Side moved{a.n, v, a.labels, a.descriptors};
                return loss(moved, itself ? moved : b);
              },
              a.rows),
          tolerance);
  if (!itself)
    compare(name + ", gradient of keys", back.at("grad_keys").toTensor(),
            differences([&](const Values& v) { return loss(a, {b.n, v, b.labels, b.descriptors}); }, b.rows),
            tolerance);
}

void contrast_family() {
  contrast(at::kFloat, 37, 0, 24, false);
  contrast(at::kFloat, 21, 70, 16, false);
  contrast(at::kFloat, 21, 0, 16, true);
  contrast(at::kBFloat16, 37, 0, 24, false);
  contrast(at::kBFloat16, 21, 70, 16, false);
  contrast(at::kHalf, 21, 70, 16, false);
  contrast(at::kDouble, 7, 0, 5, false);
  contrast(at::kFloat, 6, 5, 3, false);
}

// --- method, section 2
// ----------------------------------------------------------------------------------------------------

struct Grid {
  int64_t classes, height, width, patch_y, patch_x, stride_y, stride_x;
  int64_t rows() const { return (height - patch_y) / stride_y + 1; }
  int64_t columns() const { return (width - patch_x) / stride_x + 1; }
};

// entropy, confidence and class entropy, one after the other.
__attribute__((no_sanitize("thread"))) Values statistics(const Grid& g, const Values& logits) {
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

void statistics(at::ScalarType type, const Grid& g) {
  const at::Tensor input = numbers({1, g.classes, g.height, g.width}, type);
  const Named x{{"input", input},
                {"patch_size", std::vector<int64_t>{g.patch_y, g.patch_x}},
                {"stride", std::vector<int64_t>{g.stride_y, g.stride_x}},
                {"probabilities", false},
                {"normalize", false}};
  const std::string name = std::string("statistics of ") + c10::toString(type);
  const Named out = call("patch_statistics", x);
  const at::Tensor flat = at::cat({out.at("entropy").toTensor().flatten(), out.at("confidence").toTensor().flatten(),
                                   out.at("class_entropy").toTensor().flatten()});
  const Values start = values(input);
  compare(name, flat, statistics(g, start), tolerance_of(type));
  Named upstream;
  Values weights;
  for (const char* output : {"entropy", "confidence", "class_entropy"}) {
    const at::Tensor w = numbers(out.at(output).toTensor().sizes(), type);
    upstream[std::string("grad_") + output] = w;
    const Values some = values(w);
    weights.insert(weights.end(), some.begin(), some.end());
  }
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("pglcl_ext::patch_statistics_backward", "");
  torch::jit::Stack stack;
  const Named all = x + out + upstream;
  for (const auto& argument : handle.schema().arguments()) stack.push_back(all.at(argument.name()));
  handle.callBoxed(stack);
  compare(name + ", gradient", stack[0].toTensor(),
          differences(
              [&](const Values& v) {
                const Values s = statistics(g, v);
                double sum = 0;
                for (size_t i = 0; i < s.size(); ++i) sum += weights[i] * s[i];
                return sum;
              },
              start),
          4 * tolerance_of(type));
}

void statistics_family() {
  statistics(at::kFloat, {3, 9, 8, 4, 3, 3, 2});
  statistics(at::kFloat, {4, 8, 16, 4, 8, 4, 8});
  statistics(at::kBFloat16, {4, 8, 16, 4, 8, 8, 8});
  statistics(at::kDouble, {9, 7, 6, 3, 3, 2, 2});
}

// --- method, section 3
// ----------------------------------------------------------------------------------------------------

double disparity(const Values& a, int64_t i, const Values& b, int64_t j, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += std::fabs(a[i * channels + c] - b[j * channels + c]);
  return sum / double(channels);
}

void disparity(at::ScalarType type, int64_t n, int64_t m, int64_t channels) {
  const at::Tensor a = numbers({n, channels}, type), b = numbers({m, channels}, type), w = numbers({n, m}, type);
  const Values u = values(a), v = values(b), weights = values(w);
  const Named x{{"a", a}, {"b", b}};
  Values want;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) want.push_back(disparity(u, i, v, j, channels));
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("pglcl_ext::semantic_disparity", "");
  torch::jit::Stack stack{a, b};
  handle.callBoxed(stack);
  compare("disparity", stack[0].toTensor(), want, tolerance_of(type));
  const Named back = call("semantic_disparity_backward", x + Named{{"grad", w}, {"needs_a", true}, {"needs_b", true}});
  Values of_a(u.size()), of_b(v.size());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < channels; ++c) {
        const double d = u[i * channels + c] - v[j * channels + c], s = (d > 0) - (d < 0);
        of_a[i * channels + c] += weights[i * m + j] * s / double(channels);
        of_b[j * channels + c] -= weights[i * m + j] * s / double(channels);
      }
  compare("disparity, gradient of a", back.at("grad_a").toTensor(), of_a, tolerance_of(type));
  compare("disparity, gradient of b", back.at("grad_b").toTensor(), of_b, tolerance_of(type));
}

void bounds(at::ScalarType type, int64_t n, int64_t m, int64_t channels, int64_t count, bool positives, bool itself) {
  const auto grid = [&](int64_t rows) { return (at::rand({rows, channels}, at::kDouble) * 8).round().div(8).to(type); };
  const at::Tensor a = grid(n), y = integers(-1, 3, n), b = itself ? a : grid(m), z = itself ? y : integers(-1, 3, m);
  const Values u = values(a), v = values(b), labels = values(y), key_labels = values(z);
  Values want;
  for (int64_t i = 0; i < n; ++i) {
    Values met;
    for (int64_t j = 0; j < m; ++j)
      if (labels[i] >= 0 && key_labels[j] >= 0 && (labels[i] == key_labels[j]) == positives && !(itself && i == j))
        met.push_back(disparity(u, i, v, j, channels));
    std::sort(met.begin(), met.end());
    if (!positives) std::reverse(met.begin(), met.end());
    want.push_back(int64_t(met.size()) > count ? met[size_t(count - 1)] : positives ? kInfinity : 0.0);
  }
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("pglcl_ext::disparity_bounds", "");
  const Named x{{"descriptors", a},     {"labels", y},
                {"key_descriptors", b}, {"key_labels", z},
                {"count", count},       {"positives", positives},
                {"ignore_index", -1},   {"self_offset", itself ? 0 : -1}};
  torch::jit::Stack stack;
  for (const auto& argument : handle.schema().arguments()) stack.push_back(x.at(argument.name()));
  handle.callBoxed(stack);
  compare("bounds", stack[0].toTensor(), want, tolerance_of(type));
}

void disparity_family() {
  disparity(at::kFloat, 13, 20, 1);
  disparity(at::kDouble, 9, 37, 3);
  for (const bool positives : {true, false}) {
    bounds(at::kFloat, 20, 20, 1, 3, positives, true);
    bounds(at::kFloat, 11, 140, 2, 2, positives, false);
    bounds(at::kDouble, 5, 5, 2, 2, positives, true);
  }
}

// --- method, section 6
// ----------------------------------------------------------------------------------------------------

struct Gaussians {
  int64_t classes, depth;
  bool pairwise;
  Values means, covariances, counts;
  double temperature, scale, psi;
};

__attribute__((no_sanitize("thread"))) double gaussian_loss(const Gaussians& g, const Values& anchors,
                                                            const Values& labels) {
  const int64_t depth = g.depth;
  double total = 0, taking_part = 0;
  int counted = 0;
  for (const double count : g.counts) taking_part += count > 0;
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0 || g.counts[size_t(labels[i])] == 0) continue;
    const double* t = &anchors[i * depth];
    double sum = 0, own = 0;
    for (int64_t j = 0; j < g.classes; ++j) {
      if (g.counts[j] == 0) continue;
      const int64_t table = g.pairwise ? int64_t(labels[i]) * g.classes + j : j;
      double mean = 0, product = 0;
      for (int64_t d = 0; d < depth; ++d) {
        mean += t[d] * g.means[table * depth + d];
        for (int64_t e = 0; e < depth; ++e) product += t[d] * g.covariances[(table * depth + d) * depth + e] * t[e];
      }
      const double logit = mean / g.temperature + g.scale / (2 * g.temperature * g.temperature) * product;
      sum += (j == int64_t(labels[i]) ? 1 : g.psi / taking_part) * std::exp(logit);
      if (j == int64_t(labels[i])) own = mean / g.temperature;
    }
    total += std::log(sum) - own;
    ++counted;
  }
  return total / std::max(counted, 1);
}

void gaussian(at::ScalarType type, int64_t n, int64_t depth, bool pairwise) {
  const int64_t k = 3;
  const at::ScalarType wide = type == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor anchors = numbers({n, depth}, type, 1 / std::sqrt(double(depth))), labels = integers(-1, k, n);
  at::Tensor means = numbers({k, k, depth}, wide), roots = numbers({k, k, depth, depth}, wide, 0.3);
  at::Tensor covariances = at::matmul(roots, roots.transpose(-1, -2));
  if (!pairwise) {
    means = means.select(1, 0).contiguous();
    covariances = covariances.select(1, 0).contiguous();
  }
  const at::Tensor counts = integers(5, 9, k);
  counts.select(0, 1).zero_();
  const Gaussians g{k, depth, pairwise, values(means), values(covariances), values(counts), 0.8, 1.5, 7};
  const Named x{{"anchors", anchors},
                {"labels", labels},
                {"means", means},
                {"covariances", covariances},
                {"counts", counts},
                {"temperature", g.temperature},
                {"covariance_scale", g.scale},
                {"negative_weight", g.psi},
                {"ignore_index", -1},
                {"reduction", 1},
                {"needs_gradients", true}};
  const Values start = values(anchors), y = values(labels);
  const Named out = call("gaussian_contrast", x);
  const std::string name = std::string("gaussian of ") + c10::toString(type);
  compare(name, out.at("loss").toTensor(), {gaussian_loss(g, start, y)}, 1e-4);
  Values want = differences([&](const Values& v) { return gaussian_loss(g, v, y); }, start);
  const double valid = double(out.at("num_valid").toTensor().item<int64_t>());
  for (double& v : want) v *= valid;  // the op returns what each anchor gives by itself
  compare(name + ", gradient", out.at("gradients").toTensor(), want, type == at::kDouble ? 1e-6 : 1e-3);
}

void gaussian_family() {
  gaussian(at::kFloat, 11, 10, false);
  gaussian(at::kFloat, 9, 6, true);
  gaussian(at::kBFloat16, 5, 7, false);
  gaussian(at::kDouble, 4, 5, false);
}

}  // namespace

int main(int count, char** arguments) {
  const std::map<std::string, void (*)()> families{{"patch_contrast", contrast_family},
                                                   {"patch_statistics", statistics_family},
                                                   {"semantic_disparity", disparity_family},
                                                   {"gaussian_contrast", gaussian_family}};
  at::manual_seed(0);
  if (count > 2) witness::removed() = std::atoi(arguments[2]);
  families.at(count > 1 ? arguments[1] : "")();
  return failures ? 1 : 0;
}
