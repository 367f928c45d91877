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

// The integer type as wide as a scalar. Labels have this type, so that comparing them gives masks of the right width.
template <typename scalar_t>
using integer_t = typename IntegerOfSize<sizeof(scalar_t)>::type;

}  // namespace pglcl
