#include "semantic_disparity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace pglcl {
namespace {

constexpr int64_t kSerialWork = 1 << 15;

void for_rows(int64_t rows, int64_t work, const Parallel& parallel, const std::function<void(int64_t, int64_t)>& body) {
  const int workers = work < kSerialWork ? 1 : int(std::min<int64_t>(parallel.threads, rows));
  if (rows == 0) return;
  parallel.run(workers, [&](int worker) {
    const Share share(rows, workers, worker);
    body(share.first, share.last);
  });
}

template <typename scalar_t>
scalar_t disparity(const scalar_t* a, const scalar_t* b, int64_t channels) {
  scalar_t sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += std::abs(a[c] - b[c]);
  return sum / scalar_t(channels);
}

// 0 at ties; NaN stays NaN.
template <typename scalar_t>
scalar_t sign(scalar_t x) {
  return x != x ? x : scalar_t((x > 0) - (x < 0));
}

// Descriptors of some keys in ascending order, with one of them (an anchor's own) left out.
template <typename scalar_t, typename At>
class SortedWithout {
 public:
  SortedWithout(At at, int64_t size, int64_t left_out) : at_(at), size_(size), left_out_(left_out) {}
  int64_t size() const { return size_ - (left_out_ >= 0 ? 1 : 0); }
  scalar_t operator[](int64_t i) const { return at_(left_out_ >= 0 && i >= left_out_ ? i + 1 : i); }

 private:
  At at_;
  int64_t size_, left_out_;
};

// The count-th smallest |a - x|: the window of `count` neighbours of a whose farther end is nearest.
template <typename scalar_t, typename Sorted>
scalar_t nearest(const Sorted& x, int64_t count, scalar_t a) {
  int64_t low = 0, high = x.size() - count;  // first start whose right end is not nearer than its left neighbour
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a - x[middle] > x[middle + count] - a)
      low = middle + 1;
    else
      high = middle;
  }
  return std::max(std::abs(a - x[low]), std::abs(x[low + count - 1] - a));
}

// The count-th largest |a - x|: the farthest keys are a number of the lowest and the rest of the highest.
template <typename scalar_t, typename Sorted>
scalar_t farthest(const Sorted& x, int64_t count, scalar_t a) {
  const int64_t kept = x.size() - count;  // the window that stays is the `kept` nearest
  if (kept == 0) {
    scalar_t smallest = std::numeric_limits<scalar_t>::infinity();
    // All count: the bound is the smallest disparity, at the neighbours of a.
    int64_t low = 0, high = x.size();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (x[middle] < a)
        low = middle + 1;
      else
        high = middle;
    }
    if (low < x.size()) smallest = std::min(smallest, std::abs(x[low] - a));
    if (low > 0) smallest = std::min(smallest, std::abs(a - x[low - 1]));
    return smallest;
  }
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a - x[middle] > x[middle + kept] - a)
      low = middle + 1;
    else
      high = middle;
  }
  // Left out of the window: [0, low) and [low + kept, size).
  scalar_t result = std::numeric_limits<scalar_t>::infinity();
  if (low > 0) result = std::min(result, std::abs(a - x[low - 1]));
  if (low + kept < x.size()) result = std::min(result, std::abs(x[low + kept] - a));
  return result;
}

// One channel: sort the keys once, then search.
template <typename scalar_t>
void scalar_bounds(const DisparityBounds<scalar_t>& in, scalar_t none, scalar_t* bounds, const Parallel& parallel) {
  struct Key {
    int64_t label;
    scalar_t value;
    int64_t index;
  };
  std::vector<Key> all;
  all.reserve(in.keys);
  for (int64_t j = 0; j < in.keys; ++j)
    if (in.key_labels[j] != in.ignore_index) all.push_back({in.key_labels[j], in.key_descriptors[j], j});
  const auto by_value = [](const Key& a, const Key& b) {
    return a.value != b.value ? a.value < b.value : a.index < b.index;
  };
  std::sort(all.begin(), all.end(), by_value);
  const int64_t total = all.size();

  // The same keys class by class, each with its place in the order of all.
  struct Member {
    int64_t label, place;
  };
  std::vector<Member> members(total);
  std::vector<int64_t> place_of(in.keys, -1), rank_of(in.keys, -1);
  for (int64_t place = 0; place < total; ++place) {
    members[place] = {all[place].label, place};
    place_of[all[place].index] = place;
  }
  std::stable_sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.label < b.label; });
  for (int64_t rank = 0; rank < total; ++rank) rank_of[all[members[rank].place].index] = rank;

  for_rows(in.anchors, in.anchors * 64, parallel, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      bounds[i] = none;
      if (in.labels[i] == in.ignore_index) continue;
      const auto begin = std::lower_bound(members.begin(), members.end(), in.labels[i],
                                          [](const Member& m, int64_t label) { return m.label < label; });
      const auto end = std::upper_bound(begin, members.end(), in.labels[i],
                                        [](int64_t label, const Member& m) { return label < m.label; });
      const int64_t own_first = begin - members.begin(), own_count = end - begin;
      const scalar_t a = in.descriptors[i];
      if (in.positives) {
        int64_t self = in.self_offset >= 0 && i + in.self_offset < in.keys ? rank_of[i + in.self_offset] : -1;
        self = self >= own_first && self < own_first + own_count ? self - own_first : -1;
        const auto at = [&](int64_t q) { return all[members[own_first + q].place].value; };
        const SortedWithout<scalar_t, decltype(at)> same(at, own_count, self);
        if (same.size() > in.count) bounds[i] = nearest(same, in.count, a);
      } else {
        // The q-th key of another class lies at place q + m, where m own keys come before it.
        const auto at = [&](int64_t q) {
          int64_t low = 0, high = own_count;
          while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (members[own_first + middle].place - middle <= q)
              low = middle + 1;
            else
              high = middle;
          }
          return all[q + low].value;
        };
        const SortedWithout<scalar_t, decltype(at)> different(at, total - own_count, -1);
        if (different.size() > in.count) bounds[i] = farthest(different, in.count, a);
      }
    }
  });
}

// Several channels: all disparities of one anchor at a time, in memory of one row per thread.
template <typename scalar_t>
void vector_bounds(const DisparityBounds<scalar_t>& in, scalar_t none, scalar_t* bounds, const Parallel& parallel) {
  for_rows(in.anchors, in.anchors * in.keys * in.channels, parallel, [&](int64_t first, int64_t last) {
    std::vector<scalar_t> row(in.keys);
    for (int64_t i = first; i < last; ++i) {
      bounds[i] = none;
      if (in.labels[i] == in.ignore_index) continue;
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
  for_rows(n, n * m * channels, parallel, [&](int64_t first, int64_t last) {
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
  const scalar_t scale = scalar_t(1) / scalar_t(channels);
  if (grad_a)
    for_rows(n, n * m * channels, parallel, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t c = 0; c < channels; ++c) {
          scalar_t sum = 0;
          for (int64_t j = 0; j < m; ++j) sum += grad[i * m + j] * sign(a[i * channels + c] - b[j * channels + c]);
          grad_a[i * channels + c] = sum * scale;
        }
    });
  if (grad_b)
    for_rows(m, n * m * channels, parallel, [&](int64_t first, int64_t last) {
      // Rows of grad outside, so that its columns are read in order.
      std::fill(grad_b + first * channels, grad_b + last * channels, scalar_t(0));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = first; j < last; ++j)
          for (int64_t c = 0; c < channels; ++c)
            grad_b[j * channels + c] -= grad[i * m + j] * scale * sign(a[i * channels + c] - b[j * channels + c]);
    });
}

template <typename scalar_t>
void disparity_bounds(const DisparityBounds<scalar_t>& in, scalar_t* bounds, const Parallel& parallel) {
  const scalar_t none = in.positives ? std::numeric_limits<scalar_t>::infinity() : scalar_t(0);
  bool finite = true;
  for (int64_t i = 0; i < in.keys * in.channels; ++i) finite = finite && std::isfinite(in.key_descriptors[i]);
  for (int64_t i = 0; i < in.anchors * in.channels; ++i) finite = finite && std::isfinite(in.descriptors[i]);
  if (!finite) {
    // An order does not exist; the loss of what depends on such a descriptor is NaN whatever the bound.
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
