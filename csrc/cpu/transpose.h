// Transposes matrices by squares of 4 x 4, in vectors of 16 bytes, which every processor has.
#pragma once

#include <cstdint>

namespace pglcl {

template <typename element>
struct Square {
  typedef element four __attribute__((vector_size(4 * sizeof(element)), aligned(alignof(element)), may_alias));
  four rows[4];

  Square(const element* from, int64_t stride) {
    for (int r = 0; r < 4; ++r) rows[r] = *reinterpret_cast<const four*>(from + r * stride);
  }

  void store(element* to, int64_t stride) const {
    for (int r = 0; r < 4; ++r) *reinterpret_cast<four*>(to + r * stride) = rows[r];
  }

  void transpose() {
    const four ac_low = __builtin_shufflevector(rows[0], rows[2], 0, 4, 1, 5);
    const four ac_high = __builtin_shufflevector(rows[0], rows[2], 2, 6, 3, 7);
    const four bd_low = __builtin_shufflevector(rows[1], rows[3], 0, 4, 1, 5);
    const four bd_high = __builtin_shufflevector(rows[1], rows[3], 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5);
    rows[1] = __builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7);
    rows[2] = __builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5);
    rows[3] = __builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7);
  }
};

// out (columns, rows) = in (rows, columns), whose rows are in_stride apart; rows is a multiple of 4.
template <typename scalar_t>
void transpose(const scalar_t* in, int64_t in_stride, int64_t columns, scalar_t* out, int64_t rows) {
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    for (int64_t row = 0; row < rows; row += 4) {
      Square<scalar_t> square(in + row * in_stride + column, in_stride);
      square.transpose();
      square.store(out + column * rows + row, rows);
    }
  }
  for (; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row) out[column * rows + row] = in[row * in_stride + column];
}

// Rows [first, last) of the symmetric part of in (size, size), at out + row * out_stride.
template <typename scalar_t>
void symmetric_rows(const scalar_t* in, int64_t size, int64_t first, int64_t last, scalar_t* out, int64_t out_stride) {
  const auto mean = [&](int64_t row, int64_t column) {
    out[row * out_stride + column] = (in[row * size + column] + in[column * size + row]) / 2;
  };
  int64_t row = first;
  for (; row + 4 <= last; row += 4) {
    int64_t column = 0;
    for (; column + 4 <= size; column += 4) {
      Square<scalar_t> own(in + row * size + column, size), other(in + column * size + row, size);
      other.transpose();
      for (int r = 0; r < 4; ++r) own.rows[r] = (own.rows[r] + other.rows[r]) / scalar_t(2);
      own.store(out + row * out_stride + column, out_stride);
    }
    for (; column < size; ++column)
      for (int r = 0; r < 4; ++r) mean(row + r, column);
  }
  for (; row < last; ++row)
    for (int64_t column = 0; column < size; ++column) mean(row, column);
}

}  // namespace pglcl
