// Losses of anchors to the loss that an op returns.
#pragma once

#include "../ops.h"

namespace pglcl {

// losses (N,) themselves, or their sum, or the mean over `valid` anchors; summed in float64, in order.
template <typename scalar_t>
Tensor reduced(const Tensor& losses, int64_t valid, int64_t reduction) {
  if (reduction == kNone) return losses;
  double total = 0;
  const scalar_t* values = data<scalar_t>(losses);
  for (int64_t i = 0; i < losses.numel(); ++i) total += double(values[i]);
  if (reduction == kMean) total /= double(std::max<int64_t>(valid, 1));
  return cpu_scalar<scalar_t>(losses, losses.scalar_type(), scalar_t(total));
}

}  // namespace pglcl
