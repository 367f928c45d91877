#pragma once

#include <stdint.h>

namespace pglcl {

// Two bfloat16 numbers. One instruction multiplies them by two others, and adds both products to one float.
struct alignas(4) Bfloat16Pair {
  uint16_t first, second;
};

}  // namespace pglcl
