// The contrastive loss, both passes, against docs/method.md, sections 4 and 5. Cases: see main.
#include "brute.h"
// After the shim.
#include "cuda/kernels/patch_contrast_launch.cuh"

namespace witness {
namespace {

struct Side {
  int64_t n;
  Values rows;
  Integers labels;
  Values descriptors;
};

struct Rule {
  double temperature, near, far, psi;
  std::vector<uint8_t> positive, negative;  // masks, empty where labels and descriptors decide

  bool is_positive(const Side& a, int64_t i, const Side& b, int64_t j) const {
    if (!positive.empty()) return positive[size_t(i * b.n + j)];
    return a.labels[i] == b.labels[j] && std::fabs(a.descriptors[i] - b.descriptors[j]) <= near;
  }
  bool is_negative(const Side& a, int64_t i, const Side& b, int64_t j) const {
    if (!positive.empty()) return negative[size_t(i * b.n + j)];
    return a.labels[i] != b.labels[j] && std::fabs(a.descriptors[i] - b.descriptors[j]) >= far;
  }
};

PGLCL_UNWATCHED double loss_of(const Side& a, const Side& b, bool itself, int64_t depth, const Rule& rule) {
  double total = 0;
  int counted = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    std::vector<double> shares;  // logit and weight, one after the other
    double top = -kInfinity, positive = 0;
    int positives = 0;
    for (int64_t j = 0; j < b.n; ++j) {
      if ((itself && i == j) || a.labels[i] == -1 || b.labels[j] == -1) continue;
      double logit = 0;
      for (int64_t d = 0; d < depth; ++d) logit += a.rows[i * depth + d] * b.rows[j * depth + d];
      logit /= rule.temperature;
      const bool is_positive = rule.is_positive(a, i, b, j), is_negative = rule.is_negative(a, i, b, j);
      if (is_positive) {
        shares.insert(shares.end(), {logit, 1});
        positive += logit;
        ++positives;
      }
      if (is_negative) shares.insert(shares.end(), {logit, rule.psi});
      if (is_positive || is_negative) top = std::max(top, logit);
    }
    if (positives == 0) continue;
    double sum = 0;
    for (size_t k = 0; k < shares.size(); k += 2) sum += shares[k + 1] * std::exp(shares[k] - top);
    total += std::log(sum) + top - positive / positives;
    ++counted;
  }
  return total / std::max(counted, 1);
}

template <typename T>
Side side(int64_t n, int64_t depth, double scale) {
  return {n, numbers<T>(n * depth, scale / std::sqrt(double(depth))), integers(-1, 3, n), fractions(n, 16)};
}

struct Options {
  bool tf32 = false, masks = false;
  int64_t shared_bytes = 160 * 1024;
  int multiprocessors = 1;
  bool backward = true;
  double scale = 1;
};

// m: 0 where the anchors are the keys.
template <typename T>
void contrast(int64_t n, int64_t m, int64_t depth, const Options& options = {}) {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  const bool itself = m == 0;
  const Side a = side<T>(n, depth, options.scale), b = itself ? a : side<T>(m, depth, options.scale);
  Rule rule{0.7, 0.6, 0.2, 3, {}, {}};
  if (options.masks)
    for (std::vector<uint8_t>* mask : {&rule.positive, &rule.negative})
      for (const int64_t bit : integers(0, 2, a.n * b.n)) mask->push_back(uint8_t(bit));

  const std::vector<T> anchors = encode<T>(a.rows), keys = encode<T>(b.rows);
  const std::vector<scalar_t> h = encode<scalar_t>(a.descriptors), key_h = encode<scalar_t>(b.descriptors);
  pglcl::cuda::ContrastArguments<T> x{};
  x.anchors = anchors.data();
  x.keys = itself ? anchors.data() : keys.data();
  x.n = a.n;
  x.m = b.n;
  x.depth = depth;
  x.labels = a.labels.data();
  x.key_labels = b.labels.data();
  x.descriptors = h.data();
  x.key_descriptors = key_h.data();
  x.channels = 1;
  x.positive_bound = scalar_t(rule.near);
  x.negative_bound = scalar_t(rule.far);
  if (options.masks) {
    x.positive_mask = rule.positive.data();
    x.negative_mask = rule.negative.data();
    x.positive_stride[0] = x.negative_stride[0] = b.n;
    x.positive_stride[1] = x.negative_stride[1] = 1;
  }
  x.inverse_temperature = scalar_t(1 / rule.temperature);
  x.exact_inverse_temperature = 1 / rule.temperature;
  x.log_weight = scalar_t(std::log(rule.psi));
  x.exact_log_weight = std::log(rule.psi);
  x.ignore_index = -1;
  x.self_offset = itself ? 0 : -1;
  const pglcl::cuda::DeviceLimits device{__CUDA_ARCH__ / 10, options.shared_bytes, options.tf32,
                                         options.multiprocessors};

  auto max_logit = unwritten<double>(n);
  auto log_sum = unwritten<scalar_t>(n), positive_logit = unwritten<scalar_t>(n);
  auto losses = unwritten<scalar_t>(n), loss = unwritten<scalar_t>(1);
  auto num_positives = unwritten<int32_t>(n);
  auto num_valid = unwritten<int64_t>(1);
  auto workspace = unwritten<float>(pglcl::cuda::contrast_parts_size(pglcl::cuda::contrast_part_count(x, device), n));
  pglcl::cuda::run_contrast_forward<T>(
      x, device, {max_logit.data(), log_sum.data(), positive_logit.data(), num_positives.data(), losses.data()},
      workspace.data(), true, loss.data(), num_valid.data(), 0);

  const std::string name = std::string("contrast of ") + Numbers<T>::kName + (itself ? ", self" : ", keys") +
                           (options.tf32 ? ", TF32" : "") + (options.masks ? ", masks" : "");
  const double tolerance = options.tf32 ? 4e-3 : Numbers<T>::kTolerance;
  compare(name + ", loss", decode(loss), {loss_of(a, b, itself, depth, rule)}, tolerance);

  if (!options.backward) return;
  const std::vector<scalar_t> grad{1};
  const pglcl::cuda::ContrastGradients<scalar_t> g{grad.data(),      false,          num_valid.data(),
                                                   max_logit.data(), log_sum.data(), num_positives.data()};
  auto of_anchors = unwritten<T>(n * depth), of_keys = unwritten<T>(m * depth);
  const int anchor_parts = pglcl::cuda::gradient_part_count(x, device, true);
  const int key_parts = itself ? 1 : pglcl::cuda::gradient_part_count(x, device, false);
  auto anchor_sums = unwritten<float>(anchor_parts * n * depth), key_sums = unwritten<float>(key_parts * m * depth);
  const pglcl::cuda::GradientParts<T> to_anchors{anchor_sums.data(), of_anchors.data(), n * depth, anchor_parts};
  const pglcl::cuda::GradientParts<T> to_keys{key_sums.data(), of_keys.data(), m * depth, key_parts};
  pglcl::cuda::run_contrast_backward<T>(x, g, device, to_anchors, true, itself, 0);
  if (!itself) pglcl::cuda::run_contrast_backward<T>(x, g, device, to_keys, false, true, 0);
  pglcl::cuda::run_finish_gradients<T>(x, g, to_anchors, to_keys, itself, 0);
  compare(name + ", gradient of anchors", decode(of_anchors),
          differences(
              [&](const Values& v) {
                const Side moved{a.n, v, a.labels, a.descriptors};
                return loss_of(moved, itself ? moved : b, itself, depth, rule);
              },
              a.rows),
          tolerance);
  if (itself) return;
  compare(
      name + ", gradient of keys", decode(of_keys),
      differences([&](const Values& v) { return loss_of(a, {b.n, v, b.labels, b.descriptors}, itself, depth, rule); },
                  b.rows),
      tolerance);
}

}  // namespace
}  // namespace witness

int main(int count, char** arguments) {
  using namespace witness;
  return run(count, arguments,
             {
                 [] { contrast<float>(5, 6, 3); },                                           // 0: plain kernels
                 [] { contrast<float>(18, 35, 8); },                                         // 1: tiles, FFMA
                 [] { contrast<float>(18, 35, 8, {.tf32 = true}); },                         // 2: tiles, TF32
                 [] { contrast<pglcl::BFloat16>(18, 70, 8); },                               // 3: mma, or FFMA
                 [] { contrast<pglcl::BFloat16>(18, 0, 24, {.masks = true}); },              // 4
                 [] { contrast<pglcl::BFloat16>(3, 512, 8, {.backward = false}); },          // 5: keys shared out
                 [] { contrast<pglcl::BFloat16>(18, 70, 8, {.shared_bytes = 30 * 1024}); },  // 6: one stage
                 [] { contrast<pglcl::Float16>(18, 0, 8); },                                 // 7
                 [] { contrast<float>(3, 35, 264); },  // 8: rows that pass in chunks
                 // 9: wide anchors, of logits near the end of float32
                 [] { contrast<float>(9, 70, 8, {.backward = false, .scale = 0x1p63}); },
             });
}
