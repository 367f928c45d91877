// Disparities, their gradients, and bounds from counts (method, sections 3 and 4).
#include "semantic_disparity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../shared/disparity_search.h"

namespace pglcl {
namespace {

// For fewer differences, a second thread takes more time than it saves.
constexpr int64_t kSerialWork = 1 << 15;

template <typename scalar_t>
scalar_t disparity(const scalar_t* a, const scalar_t* b, int64_t channels) {
  scalar_t sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += std::abs(a[c] - b[c]);
  return sum / scalar_t(channels);
}

template <typename scalar_t>
bool is_finite(const scalar_t* descriptor, int64_t channels) {
  return std::all_of(descriptor, descriptor + channels, [](scalar_t x) { return std::isfinite(x); });
}

// 0 at ties; NaN stays NaN.
template <typename scalar_t>
scalar_t sign(scalar_t x) {
  return x != x ? x : scalar_t((x > 0) - (x < 0));
}

template <typename T>
struct Array {
  const T* data;
  T load(int64_t i) const { return data[i]; }
};

// One channel: sort the keys once, then search.
template <typename scalar_t>
void scalar_bounds(const DisparityBounds<scalar_t>& in, scalar_t none, scalar_t* bounds, const Parallel& parallel) {
  std::vector<int64_t> order;
  order.reserve(in.keys);
  for (int64_t j = 0; j < in.keys; ++j)
    if (in.key_labels[j] != in.ignore_index) order.push_back(j);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return in.key_descriptors[a] < in.key_descriptors[b]; });
  const int64_t total = order.size();
  std::vector<int64_t> place(total), label(total), member_of(in.keys, -1);
  for (int64_t i = 0; i < total; ++i) place[i] = i;
  std::stable_sort(place.begin(), place.end(),
                   [&](int64_t a, int64_t b) { return in.key_labels[order[a]] < in.key_labels[order[b]]; });
  std::vector<scalar_t> value(total);
  for (int64_t i = 0; i < total; ++i) {
    value[i] = in.key_descriptors[order[i]];
    label[i] = in.key_labels[order[place[i]]];
    member_of[order[place[i]]] = i;
  }
  const SortedKeys<Array<scalar_t>, Array<int64_t>> sorted{
      {value.data()}, {label.data()}, {place.data()}, {member_of.data()}, total};

  parallel.share(in.anchors, in.anchors * 64 < kSerialWork, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t self = in.self_offset >= 0 && i + in.self_offset < in.keys ? i + in.self_offset : -1;
      bounds[i] = in.labels[i] == in.ignore_index || !std::isfinite(in.descriptors[i])
                      ? none
                      : search_bound(sorted, in.labels[i], in.descriptors[i], self, in.count, in.positives, none);
    }
  });
}

// Several channels: all disparities of one anchor at a time, in memory of one row per thread.
template <typename scalar_t>
void vector_bounds(const DisparityBounds<scalar_t>& in, scalar_t none, scalar_t* bounds, const Parallel& parallel) {
  parallel.share(in.anchors, in.anchors * in.keys * in.channels < kSerialWork, [&](int64_t first, int64_t last) {
    std::vector<scalar_t> row(in.keys);
    for (int64_t i = first; i < last; ++i) {
      bounds[i] = none;
      if (in.labels[i] == in.ignore_index || !is_finite(in.descriptors + i * in.channels, in.channels)) continue;
      int64_t size = 0;
      for (int64_t j = 0; j < in.keys; ++j) {
        if (in.key_labels[j] == in.ignore_index || (in.key_labels[j] == in.labels[i]) != in.positives) continue;
        if (in.self_offset >= 0 && j == i + in.self_offset) continue;
        const scalar_t d =
            disparity(in.descriptors + i * in.channels, in.key_descriptors + j * in.channels, in.channels);
        row[size++] = in.positives ? d : -d;
      }
      if (size <= in.count) continue;
      std::nth_element(row.begin(), row.begin() + in.count - 1, row.begin() + size);
      bounds[i] = in.positives ? row[in.count - 1] : -row[in.count - 1];
    }
  });
}

}  // namespace

template <typename scalar_t>
void semantic_disparity_forward(const scalar_t* a, int64_t n, const scalar_t* b, int64_t m, int64_t channels,
                                scalar_t* out, const Parallel& parallel) {
  parallel.share(n, n * m * channels < kSerialWork, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (channels == 1) {
        for (int64_t j = 0; j < m; ++j) out[i * m + j] = std::abs(a[i] - b[j]);
      } else {
        for (int64_t j = 0; j < m; ++j) out[i * m + j] = disparity(a + i * channels, b + j * channels, channels);
      }
    }
  });
}

template <typename scalar_t>
void semantic_disparity_backward(const scalar_t* grad, const scalar_t* a, int64_t n, const scalar_t* b, int64_t m,
                                 int64_t channels, scalar_t* grad_a, scalar_t* grad_b, const Parallel& parallel) {
  // A sum over a million patches, one after the other, needs more digits than its terms.
  const double scale = 1.0 / double(channels);
  if (grad_a)
    parallel.share(n, n * m * channels < kSerialWork, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          double sum = 0;
          for (int64_t j = 0; j < m; ++j) sum += grad[i * m + j] * sign(a[i * channels + c] - b[j * channels + c]);
          grad_a[i * channels + c] = scalar_t(sum * scale);
        }
    });
  if (grad_b)
    parallel.share(m, n * m * channels < kSerialWork, [&](int64_t first, int64_t last) {
      // The outer loop is over rows of grad, so that its columns are read in order.
      std::vector<double> sums((last - first) * channels);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = first; j < last; ++j)
          for (int64_t c = 0; c < channels; ++c)
            sums[(j - first) * channels + c] -= grad[i * m + j] * sign(a[i * channels + c] - b[j * channels + c]);
      for (int64_t k = first * channels; k < last * channels; ++k)
        grad_b[k] = scalar_t(sums[k - first * channels] * scale);
    });
}

template <typename scalar_t>
void disparity_bounds(const DisparityBounds<scalar_t>& in, scalar_t* bounds, const Parallel& parallel) {
  const scalar_t none = in.positives ? std::numeric_limits<scalar_t>::infinity() : scalar_t(0);
  bool ordered = true;
  for (int64_t j = 0; j < in.keys && ordered; ++j)
    ordered = in.key_labels[j] == in.ignore_index || is_finite(in.key_descriptors + j * in.channels, in.channels);
  if (!ordered) {
    // Every anchor has a pair with the key whose descriptor is not finite, and its loss is NaN whatever the bound.
    std::fill(bounds, bounds + in.anchors, none);
  } else if (in.channels == 1) {
    scalar_bounds(in, none, bounds, parallel);
  } else {
    vector_bounds(in, none, bounds, parallel);
  }
}

#define PGLCL_INSTANTIATE(scalar_t)                                                                               \
  template void semantic_disparity_forward<scalar_t>(const scalar_t*, int64_t, const scalar_t*, int64_t, int64_t, \
                                                     scalar_t*, const Parallel&);                                 \
  template void semantic_disparity_backward<scalar_t>(const scalar_t*, const scalar_t*, int64_t, const scalar_t*, \
                                                      int64_t, int64_t, scalar_t*, scalar_t*, const Parallel&);   \
  template void disparity_bounds<scalar_t>(const DisparityBounds<scalar_t>&, scalar_t*, const Parallel&);
PGLCL_INSTANTIATE(float)
PGLCL_INSTANTIATE(double)

}  // namespace pglcl
