// SPDX-License-Identifier: Apache-2.0
// How packed weights lie in memory. A panel holds 16 rows over all columns; panels follow one another. Within
// a panel, a unit is 4 bytes of each row (one float, two half-width floats, four 8-bit or eight 4-bit
// integers), 64 bytes in all, so that one AVX-512 register holds a unit of 16 rows and lane r belongs to row
// r; the same bytes are AMX's B operand. Columns are rounded up to 32, rows to 16 (zeros).
//
//   F32        [c][16]
//   BF16, F16  [c / 2][16][2]
//   Q8_0       scales f16 [c / 32][16], then [c / 4][16][4] of q + 128 (unsigned, as vpdpbusd wants it)
//   Q4_0       scales f16 [c / 32][16], then [c / 32][4][16][4]: unit u has columns 4 u .. 4 u + 3 of 32 in
//   the low
//              and 16 + 4 u .. in the high four bits
//   Q4_K       per 256 columns: d f16 [16], dmin f16 [16], then 8 x (scale u8 [16], min u8 [16]); after all
//   of them
//              [c / 64][8][16][4]: unit u has columns 4 u .. of 64 in the low and 32 + 4 u .. in the high
//              four bits
//   Q6_K       per 256 columns: d f16 [16], scales i8 [16 parts][16]; after all of them per 128 columns 16
//   units of
//              low bits and 8 units of high bits, bytes as in quant::BlockQ6_K
// The tables of scales are padded to 64 bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace kilin::packed {

constexpr int64_t kRows = 16;                // of a panel
constexpr int64_t kUnitBytes = 64;           // 4 bytes of every row
constexpr int64_t kQ4KHeader = 64 + 8 * 32;  // bytes of scales per 256 columns
constexpr int64_t kQ6KHeader = 32 + 16 * 16;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t columns(int64_t cols) { return round_up(cols, 32); }

// Bytes of the table of scales in front of a panel's units.
constexpr int64_t header_bytes(Dtype dtype, int64_t cols) {
  switch (dtype) {
    case Dtype::kQ8_0:
    case Dtype::kQ4_0:
      return round_up(columns(cols) / 32 * kRows * 2, 64);
    case Dtype::kQ4_K:
      return cols / 256 * kQ4KHeader;
    case Dtype::kQ6_K:
      return round_up(cols / 256 * kQ6KHeader, 64);
    default:
      return 0;
  }
}

// Bytes of a panel's units.
constexpr int64_t unit_bytes(Dtype dtype, int64_t cols) {
  const int64_t c = columns(cols) * kRows;
  switch (dtype) {
    case Dtype::kF32:
      return 4 * c;
    case Dtype::kBF16:
    case Dtype::kF16:
      return 2 * c;
    case Dtype::kQ8_0:
      return c;
    case Dtype::kQ6_K:
      return c / 4 * 3;
    default:  // Q4_0, Q4_K
      return c / 2;
  }
}

constexpr int64_t panel_bytes(Dtype dtype, int64_t cols) {
  return header_bytes(dtype, cols) + unit_bytes(dtype, cols);
}

}  // namespace kilin::packed
