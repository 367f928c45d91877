// The ops' formulas (docs/method.md) in plain loops over scalars: what the kernels are compared with, in double, and
// what the instructions they take are compared with, in their own type. Anchors and keys are two sides; of those no
// pair is a patch with itself, unless `symmetric`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace plain {

template <typename scalar_t>
struct Side {
  const scalar_t *rows, *descriptors;
  const int64_t* labels;
  int64_t count;
};

template <typename scalar_t>
struct Contrast {
  Side<scalar_t> anchors, keys;
  int64_t depth;
  bool symmetric;
  scalar_t temperature, nearest, farthest;  // bounds of positives and negatives
  int64_t ignore_index;

  bool pair(int64_t i, int64_t j, bool& positive) const {
    const int64_t a = anchors.labels[i], b = keys.labels[j];
    if (a == ignore_index || b == ignore_index || (symmetric && i == j)) return false;
    const scalar_t distance = std::abs(anchors.descriptors[i] - keys.descriptors[j]);
    positive = a == b;
    return positive ? distance <= nearest : distance >= farthest;
  }
  scalar_t logit(int64_t i, int64_t j) const {
    scalar_t dot = 0;
    for (int64_t d = 0; d < depth; ++d) dot += anchors.rows[i * depth + d] * keys.rows[j * depth + d];
    return dot / temperature;
  }
};

// The loss of each anchor, 0 without a positive, and the gradient of their sum; null: not wanted. Logits must be
// moderate.
template <typename scalar_t>
void contrast(const Contrast<scalar_t>& x, scalar_t* losses, scalar_t* grad_anchors, scalar_t* grad_keys) {
  std::vector<scalar_t> exponentials(x.keys.count);
  for (int64_t i = 0; i < x.anchors.count; ++i) {
    scalar_t sum = 0, positive_sum = 0;
    int64_t positives = 0;
    bool positive;
    for (int64_t j = 0; j < x.keys.count; ++j) {
      exponentials[j] = 0;
      if (!x.pair(i, j, positive)) continue;
      const scalar_t logit = x.logit(i, j);
      exponentials[j] = std::exp(logit);
      sum += exponentials[j];
      if (!positive) continue;
      positive_sum += logit;
      ++positives;
    }
    losses[i] = positives ? std::log(sum) - positive_sum / scalar_t(positives) : scalar_t(0);
    if (!grad_anchors || positives == 0) continue;
    for (int64_t j = 0; j < x.keys.count; ++j) {
      if (!x.pair(i, j, positive)) continue;
      const scalar_t of_logit = exponentials[j] / sum - (positive ? 1 / scalar_t(positives) : 0);
      const scalar_t weight = of_logit / x.temperature;
      for (int64_t d = 0; d < x.depth; ++d) {
        grad_anchors[i * x.depth + d] += weight * x.keys.rows[j * x.depth + d];
        grad_keys[j * x.depth + d] += weight * x.anchors.rows[i * x.depth + d];
      }
    }
  }
}

struct Grid {
  int64_t classes, height, width, patch, stride;
  int64_t rows() const { return (height - patch) / stride + 1; }
  int64_t columns() const { return (width - patch) / stride + 1; }
  int64_t patches() const { return rows() * columns(); }
};

// Softmax and entropy of the pixel at `logits`, whose classes lie `step` apart.
template <typename scalar_t>
scalar_t predict(const scalar_t* logits, int64_t step, int64_t classes, scalar_t* p) {
  scalar_t highest = logits[0], sum = 0, entropy = 0;
  for (int64_t k = 1; k < classes; ++k) highest = std::max(highest, logits[k * step]);
  for (int64_t k = 0; k < classes; ++k) sum += p[k] = std::exp(logits[k * step] - highest);
  for (int64_t k = 0; k < classes; ++k) {
    p[k] /= sum;
    if (p[k] > 0) entropy -= p[k] * std::log(p[k]);
  }
  return entropy;
}

// Of one image: entropy (patches), confidence and class entropy (classes, patches).
template <typename scalar_t>
void statistics(const Grid& g, const scalar_t* logits, scalar_t* entropy, scalar_t* confidence,
                scalar_t* class_entropy) {
  const int64_t pixels = g.height * g.width;
  std::vector<scalar_t> p(pixels * g.classes), h(pixels);
  for (int64_t x = 0; x < pixels; ++x) h[x] = predict(logits + x, pixels, g.classes, p.data() + x * g.classes);
  for (int64_t j = 0; j < g.patches(); ++j) {
    const int64_t top = j / g.columns() * g.stride, left = j % g.columns() * g.stride;
    for (int64_t k = -1; k < g.classes; ++k) {
      scalar_t sum = 0, product = 0;
      for (int64_t y = top; y < top + g.patch; ++y)
        for (int64_t x = y * g.width + left; x < y * g.width + left + g.patch; ++x) {
          sum += k < 0 ? h[x] : p[x * g.classes + k];
          if (k >= 0) product += p[x * g.classes + k] * h[x];
        }
      const scalar_t mean = sum / scalar_t(g.patch * g.patch);
      if (k < 0) {
        entropy[j] = mean;
      } else {
        confidence[k * g.patches() + j] = mean;
        class_entropy[k * g.patches() + j] = sum > 0 ? product / sum : scalar_t(0);
      }
    }
  }
}

// Gradient to the logits, zero-filled by the caller, from those of the three outputs.
template <typename scalar_t>
void statistics_gradient(const Grid& g, const scalar_t* logits, const scalar_t* confidence,
                         const scalar_t* class_entropy, const scalar_t* grad_entropy, const scalar_t* grad_confidence,
                         const scalar_t* grad_class_entropy, scalar_t* grad_logits) {
  const int64_t pixels = g.height * g.width, patches = g.patches();
  const scalar_t size = scalar_t(g.patch * g.patch);
  std::vector<scalar_t> p(g.classes), dp(g.classes);
  for (int64_t j = 0; j < patches; ++j) {
    const int64_t top = j / g.columns() * g.stride, left = j % g.columns() * g.stride;
    for (int64_t y = top; y < top + g.patch; ++y)
      for (int64_t x = y * g.width + left; x < y * g.width + left + g.patch; ++x) {
        const scalar_t h = predict(logits + x, pixels, g.classes, p.data());
        scalar_t dh = grad_entropy[j] / size, mean = 0;
        for (int64_t k = 0; k < g.classes; ++k) {
          const int64_t at = k * patches + j;
          const scalar_t share = confidence[at] > 0 ? grad_class_entropy[at] / (confidence[at] * size) : scalar_t(0);
          dh += share * p[k];
          dp[k] = grad_confidence[at] / size + share * (h - class_entropy[at]);
          mean += p[k] * dp[k];
        }
        for (int64_t k = 0; k < g.classes; ++k)
          if (p[k] > 0) grad_logits[k * pixels + x] += p[k] * (dp[k] - mean - dh * (std::log(p[k]) + h));
      }
  }
}

template <typename scalar_t>
struct Gaussian {  // covariances are symmetric
  const scalar_t *anchors, *means, *covariances;
  const int64_t *labels, *counts;
  int64_t n, depth, classes;
  scalar_t temperature, covariance_scale, negative_weight;
};

// The loss of each anchor and its gradient, 0 where it does not count.
template <typename scalar_t>
void gaussian(const Gaussian<scalar_t>& x, scalar_t* losses, scalar_t* gradients) {
  const scalar_t spread = x.covariance_scale / (x.temperature * x.temperature);
  scalar_t taking_part = 0;
  for (int64_t k = 0; k < x.classes; ++k) taking_part += x.counts[k] > 0;
  std::vector<scalar_t> exponent(x.classes), of_exponent(x.classes * x.depth);
  for (int64_t i = 0; i < x.n; ++i) {
    const scalar_t* t = x.anchors + i * x.depth;
    scalar_t* gradient = gradients + i * x.depth;
    const int64_t own = x.labels[i];
    losses[i] = 0;
    std::fill_n(gradient, x.depth, scalar_t(0));
    if (own < 0 || x.counts[own] == 0) continue;
    scalar_t own_logit = 0, highest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < x.classes; ++k) {
      if (x.counts[k] == 0) continue;
      exponent[k] = k == own ? scalar_t(0) : std::log(x.negative_weight / taking_part);
      for (int64_t d = 0; d < x.depth; ++d) {
        scalar_t product = 0;
        const scalar_t* s = x.covariances + k * x.depth * x.depth;
        for (int64_t c = 0; c < x.depth; ++c) product += s[d * x.depth + c] * t[c];
        const scalar_t mean = x.means[k * x.depth + d];
        exponent[k] += t[d] * mean / x.temperature + spread / 2 * t[d] * product;
        of_exponent[k * x.depth + d] = mean / x.temperature + spread * product;
        if (k == own) own_logit += t[d] * mean / x.temperature;
      }
      highest = std::max(highest, exponent[k]);
    }
    for (int64_t k = 0; k < x.classes; ++k)
      if (x.counts[k] > 0) sum += std::exp(exponent[k] - highest);
    losses[i] = highest + std::log(sum) - own_logit;
    for (int64_t k = 0; k < x.classes; ++k) {
      if (x.counts[k] == 0) continue;
      const scalar_t share = std::exp(exponent[k] - highest) / sum;
      for (int64_t d = 0; d < x.depth; ++d)
        gradient[d] += share * of_exponent[k * x.depth + d] - (k == own ? x.means[k * x.depth + d] / x.temperature : 0);
    }
  }
}

}  // namespace plain
