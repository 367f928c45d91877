#pragma once

#include <stdint.h>

namespace pglcl {

template <int kBytes>
struct IntegerOfSize;
template <>
struct IntegerOfSize<4> {
  using type = int32_t;
};
template <>
struct IntegerOfSize<8> {
  using type = int64_t;
};

// The integer as wide as a scalar: labels travel in it, so that comparing them gives masks of the scalars' lane width.
template <typename scalar_t>
using integer_t = typename IntegerOfSize<sizeof(scalar_t)>::type;

}  // namespace pglcl
