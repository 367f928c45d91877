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

// Random anchors and keys, as the kernels and as brute force take them. `x` points into the members.
template <typename T>
struct Inputs {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  const int64_t depth;
  const bool itself;
  const Side a, b;
  Rule rule{0.7, 0.6, 0.2, 3, {}, {}};
  const std::vector<T> anchors, keys;
  const std::vector<scalar_t> h, key_h;
  pglcl::cuda::ContrastArguments<T> x{};

  // m: 0 where the anchors are the keys.
  Inputs(int64_t n, int64_t m, int64_t depth, const Options& options)
      : depth(depth),
        itself(m == 0),
        a(side<T>(n, depth, options.scale)),
        b(itself ? a : side<T>(m, depth, options.scale)),
        anchors(encode<T>(a.rows)),
        keys(encode<T>(b.rows)),
        h(encode<scalar_t>(a.descriptors)),
        key_h(encode<scalar_t>(b.descriptors)) {
    if (options.masks)
      for (std::vector<uint8_t>* mask : {&rule.positive, &rule.negative})
        for (const int64_t bit : integers(0, 2, a.n * b.n)) mask->push_back(uint8_t(bit));
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
  }
  Inputs(const Inputs&) = delete;

  double loss_at(const Values& of_anchors, const Values& of_keys) const {
    return loss_of({a.n, of_anchors, a.labels, a.descriptors}, {b.n, of_keys, b.labels, b.descriptors}, itself, depth,
                   rule);
  }
};

// What the forward pass writes, of which the backward pass reads some.
template <typename T>
struct Outputs {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  std::vector<double> max_logit;
  std::vector<scalar_t> log_sum, positive_logit, losses, loss = unwritten<scalar_t>(1);
  std::vector<int32_t> num_positives;
  std::vector<int64_t> num_valid = unwritten<int64_t>(1);

  explicit Outputs(int64_t n)
      : max_logit(unwritten<double>(n)),
        log_sum(unwritten<scalar_t>(n)),
        positive_logit(unwritten<scalar_t>(n)),
        losses(unwritten<scalar_t>(n)),
        num_positives(unwritten<int32_t>(n)) {}
};

template <typename T>
Outputs<T> forward(const Inputs<T>& in, const pglcl::cuda::DeviceLimits& device) {
  Outputs<T> out(in.a.n);
  auto workspace =
      unwritten<float>(pglcl::cuda::contrast_parts_size(pglcl::cuda::contrast_part_count(in.x, device), in.a.n));
  pglcl::cuda::run_contrast_forward<T>(in.x, device,
                                       {out.max_logit.data(), out.log_sum.data(), out.positive_logit.data(),
                                        out.num_positives.data(), out.losses.data()},
                                       workspace.data(), true, out.loss.data(), out.num_valid.data(), 0);
  return out;
}

// The gradients of the loss: of the anchors, and of the keys where these are others.
template <typename T>
std::pair<std::vector<T>, std::vector<T>> backward(const Inputs<T>& in, const Outputs<T>& out,
                                                   const pglcl::cuda::DeviceLimits& device) {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  const std::vector<scalar_t> grad{1};
  const pglcl::cuda::ContrastGradients<scalar_t> g{
      grad.data(), false, out.num_valid.data(), out.max_logit.data(), out.log_sum.data(), out.num_positives.data()};
  const int64_t anchor_size = in.a.n * in.depth, key_size = in.itself ? 0 : in.b.n * in.depth;
  auto of_anchors = unwritten<T>(anchor_size), of_keys = unwritten<T>(key_size);
  const int anchor_parts = pglcl::cuda::gradient_part_count(in.x, device, true);
  const int key_parts = in.itself ? 1 : pglcl::cuda::gradient_part_count(in.x, device, false);
  auto anchor_sums = unwritten<float>(anchor_parts * anchor_size), key_sums = unwritten<float>(key_parts * key_size);
  const pglcl::cuda::GradientParts<T> to_anchors{anchor_sums.data(), of_anchors.data(), anchor_size, anchor_parts};
  const pglcl::cuda::GradientParts<T> to_keys{key_sums.data(), of_keys.data(), key_size, key_parts};
  pglcl::cuda::run_contrast_backward<T>(in.x, g, device, to_anchors, true, in.itself, 0);
  if (!in.itself) pglcl::cuda::run_contrast_backward<T>(in.x, g, device, to_keys, false, true, 0);
  pglcl::cuda::run_finish_gradients<T>(in.x, g, to_anchors, to_keys, in.itself, 0);
  return {of_anchors, of_keys};
}

template <typename T>
void contrast(int64_t n, int64_t m, int64_t depth, const Options& options = {}) {
  const Inputs<T> in(n, m, depth, options);
  const pglcl::cuda::DeviceLimits device{__CUDA_ARCH__ / 10, options.shared_bytes, options.tf32,
                                         options.multiprocessors};
  const std::string name = std::string("contrast of ") + Numbers<T>::kName + (in.itself ? ", self" : ", keys") +
                           (options.tf32 ? ", TF32" : "") + (options.masks ? ", masks" : "");
  const double tolerance = options.tf32 ? 4e-3 : Numbers<T>::kTolerance;
  const Outputs<T> out = forward(in, device);
  compare(name + ", loss", decode(out.loss), {in.loss_at(in.a.rows, in.b.rows)}, tolerance);
  if (!options.backward) return;
  const auto [of_anchors, of_keys] = backward(in, out, device);
  const auto at_anchors = [&](const Values& v) { return in.loss_at(v, in.itself ? v : in.b.rows); };
  compare(name + ", gradient of anchors", decode(of_anchors), differences(at_anchors, in.a.rows), tolerance);
  if (in.itself) return;
  const auto at_keys = [&](const Values& v) { return in.loss_at(in.a.rows, v); };
  compare(name + ", gradient of keys", decode(of_keys), differences(at_keys, in.b.rows), tolerance);
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
                 [] { contrast<float>(3, 260, 8, {.multiprocessors = 2}); },  // 10: FFMA, keys shared out
             });
}
