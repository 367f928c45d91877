// C (+)= A B for tiles in the first- and second-level caches. It is the only matrix product of the CPU kernels.
#pragma once

#include "bfloat16_pair.h"
#include "simd.h"

namespace pglcl::PGLCL_ISA {

// What is multiplied, and how its products are added to a vector of sums: here, numbers of the type of their sums.
template <typename operand_t>
struct Product {
  using sum_t = operand_t;
  using vec = vec_t<operand_t>;
  static PGLCL_INLINE vec load_operands(const operand_t* from) { return load(from); }
  static PGLCL_INLINE void add(vec& sum, operand_t x, vec y) { sum += x * y; }
};

#if defined(__AVX512BF16__)
// Two products in each lane: exact, and added in float32.
template <>
struct Product<Bfloat16Pair> {
  using sum_t = float;
  using vec = __m512bh;
  static PGLCL_INLINE vec load_operands(const Bfloat16Pair* from) { return (vec)_mm512_loadu_si512(from); }
  static PGLCL_INLINE void add(vec_t<float>& sum, Bfloat16Pair x, vec y) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    sum = (vec_t<float>)_mm512_dpbf16_ps((__m512)sum, (vec)_mm512_set1_epi32(bits), y);
  }
};
#endif

template <typename operand_t>
using sum_t = typename Product<operand_t>::sum_t;

// The places of the rows of C: consecutive, or given by an index (the sorted rows of a gradient).
template <typename scalar_t>
struct RowsOfC {
  scalar_t* data;
  int64_t stride;
  const int32_t* index;  // null: row r is the r-th
  PGLCL_INLINE scalar_t* row(int64_t r) const { return data + (index ? int64_t(index[r]) : r) * stride; }
};

// One kRows x kPanel tile. A(r, k) = a[r * row_step + k * k_step], B(k, c) = b[k * ldb + c].
template <int kRows, typename operand_t>
PGLCL_INLINE void micro_kernel(int64_t depth, const operand_t* a, int64_t row_step, int64_t k_step, const operand_t* b,
                               int64_t ldb, vec_t<sum_t<operand_t>> (&acc)[kRows][2]) {
  using P = Product<operand_t>;
  constexpr int kLanes = Simd<sum_t<operand_t>>::kLanes;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = vec_t<sum_t<operand_t>>{};
  for (int64_t k = 0; k < depth; ++k) {
    const typename P::vec b0 = P::load_operands(b + k * ldb);
    const typename P::vec b1 = P::load_operands(b + k * ldb + kLanes);
    const operand_t* ak = a + k * k_step;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const operand_t x = ak[r * row_step];
      P::add(acc[r][0], x, b0);
      P::add(acc[r][1], x, b1);
    }
  }
}

// Prefetches what the next steps read, since a processor does not look past a whole micro-kernel: rows of A, rows of C,
// which lie anywhere, and the next columns of B, which are a row's length apart. The hardware foresees none of them.
template <typename operand_t>
PGLCL_INLINE void prefetch_a(const operand_t* next_rows, int64_t row_step, int64_t depth) {
  for (int64_t r = 0; r < kMicroRows; ++r)
    for (int64_t k = 0; k < depth; k += 64 / int64_t(sizeof(operand_t)))
      __builtin_prefetch(next_rows + r * row_step + k);
}
template <typename scalar_t>
PGLCL_INLINE void prefetch_c(const RowsOfC<scalar_t>& c, int64_t row, int64_t height, int64_t column) {
  for (int64_t r = row; r < row + height; ++r) __builtin_prefetch(c.row(r) + column, 1);
}
template <typename operand_t>
PGLCL_INLINE void prefetch_b(const operand_t* next_columns, int64_t ldb, int64_t first, int64_t depth) {
  for (int64_t k = first; k < first + kMicroRows && k < depth; ++k) __builtin_prefetch(next_columns + k * ldb);
}

// Adds or writes one micro-tile to C, of which `height` rows and `width` columns are inside C.
template <int kRows, bool kAccumulate, typename operand_t>
PGLCL_INLINE void micro_tile(int64_t depth, const operand_t* a, int64_t row_step, int64_t k_step, const operand_t* b,
                             int64_t ldb, RowsOfC<sum_t<operand_t>> c, int64_t row, int64_t height, int64_t column,
                             int64_t width) {
  using scalar_t = sum_t<operand_t>;
  constexpr int kLanes = Simd<scalar_t>::kLanes;
  constexpr int kPanel = Simd<scalar_t>::kPanel;
  vec_t<scalar_t> acc[kRows][2];
  micro_kernel<kRows>(depth, a, row_step, k_step, b, ldb, acc);
  if (height == kRows && width == kPanel) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      scalar_t* out = c.row(row + r) + column;
      store(out, kAccumulate ? load(out) + acc[r][0] : acc[r][0]);
      store(out + kLanes, kAccumulate ? load(out + kLanes) + acc[r][1] : acc[r][1]);
    }
    return;
  }
  scalar_t edge[kRows][kPanel];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    store(edge[r], acc[r][0]);
    store(edge[r] + kLanes, acc[r][1]);
  }
  for (int64_t r = 0; r < height; ++r) {
    scalar_t* out = c.row(row + r) + column;
    for (int64_t i = 0; i < width; ++i) out[i] = kAccumulate ? out[i] + edge[r][i] : edge[r][i];
  }
}

// Whether the rows that are left are computed faster by fours than by kMicroRows.
PGLCL_INLINE bool by_fours(int64_t left) {
  const auto whole = [left](int64_t rows) { return (left + rows - 1) / rows * rows; };
  return left <= 8 && whole(4) < whole(kMicroRows);
}

template <typename operand_t, bool kAccumulate>
inline void gemm_of_depth_block(int64_t rows, int64_t columns, int64_t depth, const operand_t* a, int64_t row_step,
                                int64_t k_step, const operand_t* b, int64_t ldb, RowsOfC<sum_t<operand_t>> c) {
  constexpr int kPanel = Simd<sum_t<operand_t>>::kPanel;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = columns - column < kPanel ? columns - column : kPanel;
    for (int64_t row = 0; row < rows;) {
      const bool fours = by_fours(rows - row);
      const int64_t next = row + (fours ? 4 : kMicroRows), height = (next < rows ? next : rows) - row;
      if (k_step == 1 && next < rows) prefetch_a(a + next * row_step, row_step, depth);
      if constexpr (kAccumulate) {
        prefetch_c(c, row, height, column);
        if (column + kPanel < columns) prefetch_b(b + column + kPanel, ldb, row, depth);
      }
      const operand_t* rows_of_a = a + row * row_step;
      if (fours)
        micro_tile<4, kAccumulate>(depth, rows_of_a, row_step, k_step, b + column, ldb, c, row, height, column, width);
      else
        micro_tile<kMicroRows, kAccumulate>(depth, rows_of_a, row_step, k_step, b + column, ldb, c, row, height, column,
                                            width);
      row = next;
    }
  }
}

// So many products are summed one after the other. Of a longer depth, the sums of such blocks are added up: one sum of
// thousands of numbers would lose digits.
constexpr int64_t kDepthBlock = 256;

// Computes rows x columns of C. Of pairs, depth counts pairs. A must be readable up to the next multiple of 4 rows, and
// B up to the next multiple of kPanel columns. The numbers there do not reach C.
template <typename operand_t, bool kAccumulate>
inline void tile_gemm(int64_t rows, int64_t columns, int64_t depth, const operand_t* a, int64_t row_step,
                      int64_t k_step, const operand_t* b, int64_t ldb, RowsOfC<sum_t<operand_t>> c) {
  const int64_t first_block = depth < kDepthBlock ? depth : kDepthBlock;
  gemm_of_depth_block<operand_t, kAccumulate>(rows, columns, first_block, a, row_step, k_step, b, ldb, c);
  for (int64_t k = kDepthBlock; k < depth; k += kDepthBlock) {
    const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
    gemm_of_depth_block<operand_t, true>(rows, columns, block, a + k * k_step, row_step, k_step, b + k * ldb, ldb, c);
  }
}

}  // namespace pglcl::PGLCL_ISA
