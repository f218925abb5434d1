// SPDX-License-Identifier: Apache-2.0
// How packed weights lie in memory. A panel holds 16 rows over all columns; panels follow one another. Within
// a panel, a unit is 4 bytes of each row (one float, two half-width floats, four 8-bit or eight 4-bit
// integers), 64 bytes in all, so that one AVX-512 register holds a unit of 16 rows and lane r belongs to row
// r; the same bytes are AMX's B operand. Columns are rounded up to 32, rows to 16 (zeros).
//
//   F32        [c][16]
//   BF16, F16  [c / 2][16][2]
//   Q8_0       groups of 64 columns: scales f16 [2 blocks][16], then [16][16][4] of q + 128
//              (unsigned, as vpdpbusd wants it)
//   Q4_0       groups of 64 columns: scales f16 [2 blocks][16], then per block [4][16][4]: unit u
//              has columns 4 u .. 4 u + 3 of 32 in the low and 16 + 4 u .. in the high four bits
//   Q4_K       groups of 256 columns: d f16 [16], dmin f16 [16], 8 x (scale u8 [16], min u8 [16]),
//              then per 64 columns [8][16][4]: unit u has columns 4 u .. of 64 in the low and
//              32 + 4 u .. in the high four bits
//   Q6_K       groups of 256 columns: d f16 [16], scales i8 [16 parts][16], 32 bytes of padding,
//              then per 128 columns 16 units of low bits and 8 units of high bits, bytes as in
//              quant::BlockQ6_K
//
// Scales lie beside their integers, so that a panel is one stream: with all scales in front, the processor's
// prefetcher started anew at every panel (docs/notes/20261124-cpu-matmul.md).
#pragma once
#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace kilin::packed {

constexpr int64_t kRows = 16;       // of a panel
constexpr int64_t kUnitBytes = 64;  // 4 bytes of every row

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t columns(int64_t cols) { return round_up(cols, 32); }

// Columns that share a header of scales, the header's bytes and the bytes of all.
struct Group {
  int64_t columns, header, bytes;
};
constexpr Group group(Dtype dtype) {
  switch (dtype) {
    case Dtype::kQ8_0:
      return {64, 64, 64 + 16 * kUnitBytes};
    case Dtype::kQ4_0:
      return {64, 64, 64 + 8 * kUnitBytes};
    case Dtype::kQ4_K:
      return {256, 320, 320 + 32 * kUnitBytes};
    case Dtype::kQ6_K:
      return {256, 320, 320 + 48 * kUnitBytes};
    case Dtype::kF32:
      return {32, 0, 32 * kUnitBytes};
    default:  // BF16, F16
      return {32, 0, 16 * kUnitBytes};
  }
}

constexpr int64_t panel_bytes(Dtype dtype, int64_t cols) {
  const Group g = group(dtype);
  return round_up(cols, g.columns) / g.columns * g.bytes;
}

}  // namespace kilin::packed
