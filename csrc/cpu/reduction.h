// Reduces the losses of anchors to the loss that an op returns.
#pragma once

#include "../ops.h"
#include "buffer.h"

namespace pglcl {

// The losses (N,) of anchors, and the result of the op: these losses, their sum, or the mean over those that count.
// Only the result becomes a tensor.
template <typename scalar_t>
class Losses {
 public:
  Losses(const Tensor& anchors, int64_t reduction)
      : reduction_(reduction),
        count_(anchors.size(0)),
        out_(reduction == kNone ? empty(anchors, {count_}, accumulate_type(anchors))
                                : empty(anchors, {}, accumulate_type(anchors))),
        values_(reduction == kNone ? 0 : count_) {}

  scalar_t* data() { return reduction_ == kNone ? mutable_data<scalar_t>(out_) : values_.data(); }

  // The losses are summed in float64, in their order.
  const Tensor& reduced(int64_t valid) const {
    if (reduction_ == kNone) return out_;
    double total = 0;
    for (const scalar_t value : values_) total += double(value);
    if (reduction_ == kMean) total /= double(std::max<int64_t>(valid, 1));
    *mutable_data<scalar_t>(out_) = scalar_t(total);
    return out_;
  }

 private:
  int64_t reduction_, count_;
  Tensor out_;
  Buffer<scalar_t> values_;
};

}  // namespace pglcl
