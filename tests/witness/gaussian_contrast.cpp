// The Gaussian contrastive loss and its gradient against docs/method.md, section 6.
#include "brute.h"
// After the shim.
#include "cuda/kernels/gaussian_contrast.cuh"

namespace witness {
namespace {

struct Tables {
  int64_t classes, depth;
  bool pairwise;
  Values means, covariances;
  Integers counts;
  double temperature, scale, psi;
};

// Of every anchor; 0 where it does not count.
PGLCL_UNWATCHED Values losses_of(const Tables& g, const Values& anchors, const Integers& labels) {
  const int64_t depth = g.depth;
  double taking_part = 0;
  for (const int64_t count : g.counts) taking_part += count > 0;
  Values out;
  for (size_t i = 0; i < labels.size(); ++i) {
    out.push_back(0);
    if (labels[i] < 0 || g.counts[size_t(labels[i])] == 0) continue;
    const double* t = &anchors[i * size_t(depth)];
    double sum = 0, own = 0;
    for (int64_t j = 0; j < g.classes; ++j) {
      if (g.counts[size_t(j)] == 0) continue;
      const int64_t table = g.pairwise ? labels[i] * g.classes + j : j;
      double mean = 0, product = 0;
      for (int64_t d = 0; d < depth; ++d) {
        mean += t[d] * g.means[table * depth + d];
        for (int64_t e = 0; e < depth; ++e) product += t[d] * g.covariances[(table * depth + d) * depth + e] * t[e];
      }
      const double logit = mean / g.temperature + g.scale / (2 * g.temperature * g.temperature) * product;
      sum += (j == labels[i] ? 1 : g.psi / taking_part) * std::exp(logit);
      if (j == labels[i]) own = mean / g.temperature;
    }
    out.back() = std::log(sum) - own;
  }
  return out;
}

template <typename T>
void gaussian(int64_t n, int64_t depth, bool pairwise) {
  using scalar_t = typename pglcl::Accumulate<T>::type;
  const int64_t k = 3, tables = pairwise ? k * k : k;
  Values covariances;
  for (int64_t table = 0; table < tables; ++table) {
    const Values root = numbers<scalar_t>(depth * depth, 0.3);
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t e = 0; e < depth; ++e) {
        double sum = 0;
        for (int64_t f = 0; f < depth; ++f) sum += root[d * depth + f] * root[e * depth + f];
        covariances.push_back(sum);
      }
  }
  const Tables g{k, depth, pairwise, numbers<scalar_t>(tables * depth), covariances, {7, 0, 5}, 0.8, 1.5, 7};
  const Values start = numbers<T>(n * depth, 1 / std::sqrt(double(depth)));
  const Integers labels = integers(-1, k, n);
  Integers order;  // by class
  for (int64_t label = -1; label < k; ++label)
    for (int64_t i = 0; i < n; ++i)
      if (labels[size_t(i)] == label) order.push_back(i);
  const std::vector<T> anchors = encode<T>(start);
  const std::vector<scalar_t> means = encode<scalar_t>(g.means), wide = encode<scalar_t>(g.covariances);
  const pglcl::cuda::GaussianArguments<T> x{
      anchors.data(),  n,        depth, k, labels.data(), pairwise ? order.data() : nullptr, means.data(), wide.data(),
      g.counts.data(), pairwise, -1};
  auto losses = unwritten<scalar_t>(n), gradients = unwritten<scalar_t>(n * depth), loss = unwritten<scalar_t>(1);
  auto counted = unwritten<int32_t>(n);
  auto num_valid = unwritten<int64_t>(1);
  pglcl::cuda::run_gaussian_contrast<T>(
      x, {1 / g.temperature, g.scale / (g.temperature * g.temperature), std::log2(g.psi)}, 160 * 1024,
      {losses.data(), counted.data(), gradients.data()}, true, loss.data(), num_valid.data(), 0);
  const std::string name = std::string("gaussian of ") + Numbers<T>::kName;
  const Values want = losses_of(g, start, labels);
  double total = 0, valid = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    total += want[i];
    valid += labels[i] >= 0 && g.counts[size_t(labels[i])] > 0;
  }
  compare(name + ", losses", decode(losses), want, 1e-4);
  compare(name + ", mean", decode(loss), {total / std::max(valid, 1.0)}, 1e-4);
  // What each anchor gives by itself: the gradient of the sum.
  compare(name + ", gradients", decode(gradients),
          differences(
              [&](const Values& v) {
                double sum = 0;
                for (const double one : losses_of(g, v, labels)) sum += one;
                return sum;
              },
              start),
          sizeof(T) == 8 ? 1e-6 : 1e-3);
}

}  // namespace
}  // namespace witness

int main(int count, char** arguments) {
  using namespace witness;
  return run(count, arguments,
             {
                 [] { gaussian<float>(9, 6, false); },            // 0
                 [] { gaussian<float>(9, 6, true); },             // 1: anchors of several tables in a block
                 [] { gaussian<pglcl::BFloat16>(5, 7, false); },  // 2
                 [] { gaussian<double>(4, 5, false); },           // 3
             });
}
