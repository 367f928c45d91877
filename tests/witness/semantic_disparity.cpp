// Disparity, its gradient and the bounds taken from it, against docs/method.md, sections 3 and 4.
#include "brute.h"
// After the shim.
#include "cuda/kernels/semantic_disparity.cuh"

namespace witness {
namespace {

PGLCL_UNWATCHED double pair(const Values& a, int64_t i, const Values& b, int64_t j, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += std::fabs(a[i * channels + c] - b[j * channels + c]);
  return sum / double(channels);
}

template <typename T>
void disparity(int64_t n, int64_t m, int64_t channels) {
  const Values u = numbers<T>(n * channels), v = numbers<T>(m * channels), w = numbers<T>(n * m);
  const std::vector<T> a = encode<T>(u), b = encode<T>(v), grad = encode<T>(w);
  Values want;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) want.push_back(pair(u, i, v, j, channels));
  auto out = unwritten<T>(n * m), of_a = unwritten<T>(n * channels), of_b = unwritten<T>(m * channels);
  pglcl::cuda::run_disparity_forward<T>(a.data(), b.data(), out.data(), n, m, channels, 0);
  compare("disparity", decode(out), want, Numbers<T>::kTolerance);
  Values want_a(u.size()), want_b(v.size());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < channels; ++c) {
        const double d = u[i * channels + c] - v[j * channels + c], s = (d > 0) - (d < 0);
        want_a[i * channels + c] += w[i * m + j] * s / double(channels);
        want_b[j * channels + c] -= w[i * m + j] * s / double(channels);
      }
  pglcl::cuda::run_disparity_backward<T>(grad.data(), a.data(), b.data(), of_a.data(), n, m, channels, m, 1, 0);
  pglcl::cuda::run_disparity_backward<T>(grad.data(), b.data(), a.data(), of_b.data(), m, n, channels, 1, m, 0);
  compare("disparity, gradient of a", decode(of_a), want_a, Numbers<T>::kTolerance);
  compare("disparity, gradient of b", decode(of_b), want_b, Numbers<T>::kTolerance);
}

// The orders of SortedKeys; here no key is ignored.
template <typename T>
struct Sorted {
  std::vector<T> value;
  Integers label, place, member_of, total;

  Sorted(const std::vector<T>& b, const Integers& labels) {
    const int64_t m = int64_t(b.size());
    Integers order(b.size());
    for (int64_t j = 0; j < m; ++j) order[size_t(j)] = j;
    place = order;
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return b[i] < b[j]; });
    std::stable_sort(place.begin(), place.end(),
                     [&](int64_t p, int64_t q) { return labels[order[p]] < labels[order[q]]; });
    member_of.resize(b.size());
    for (int64_t q = 0; q < m; ++q) {
      value.push_back(b[order[q]]);
      label.push_back(labels[order[place[q]]]);
      member_of[order[place[q]]] = q;
    }
    total = {m};
  }
};

template <typename T>
void bounds(int64_t n, int64_t m, int64_t channels, int64_t count, bool positives, bool itself) {
  const Values u = fractions(n * channels, 8), v = itself ? u : fractions(m * channels, 8);
  const Integers y = integers(0, 3, n), z = itself ? y : integers(0, 3, m);
  Values want;
  for (int64_t i = 0; i < n; ++i) {
    Values met;
    for (int64_t j = 0; j < m; ++j)
      if ((y[i] == z[j]) == positives && !(itself && i == j)) met.push_back(pair(u, i, v, j, channels));
    std::sort(met.begin(), met.end());
    if (!positives) std::reverse(met.begin(), met.end());
    want.push_back(int64_t(met.size()) > count ? met[size_t(count - 1)] : positives ? kInfinity : 0.0);
  }
  const std::vector<T> a = encode<T>(u), b = encode<T>(v);
  const pglcl::cuda::BoundsInputs<T> x{a.data(), b.data(), y.data(), z.data(),        n,        m,
                                       channels, count,    -1,       itself ? 0 : -1, positives};
  auto out = unwritten<T>(n);
  if (channels == 1) {
    const Sorted<T> keys(b, z);
    pglcl::cuda::run_bounds_sorted<T>(
        x, {keys.value.data(), keys.label.data(), keys.place.data(), keys.member_of.data(), keys.total.data()},
        out.data(), 0);
  } else {
    pglcl::cuda::run_bounds_select<T>(x, out.data(), 0);
  }
  compare("bounds", decode(out), want, Numbers<T>::kTolerance);
}

}  // namespace
}  // namespace witness

int main(int count, char** arguments) {
  using namespace witness;
  return run(count, arguments,
             {
                 [] { bounds<float>(3, 140, 2, 2, false, false); },  // 0: digit by digit
                 [] { bounds<double>(5, 5, 2, 2, true, true); },     // 1
                 [] { bounds<float>(20, 20, 1, 3, true, true); },    // 2: of sorted keys
                 [] { bounds<float>(7, 20, 1, 3, false, false); },   // 3
                 [] { disparity<float>(13, 20, 1); },                // 4
                 [] { disparity<double>(3, 37, 3); },                // 5
             });
}
