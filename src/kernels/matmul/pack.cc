// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/error.h"
#include "base/float16.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul.h"
#include "quant/formats.h"

namespace kilin {
namespace {

using packed::kRows;
using quant::BlockQ4_0;
using quant::BlockQ4_K;
using quant::BlockQ6_K;
using quant::BlockQ8_0;

// The rows that one panel takes from a stored matrix.
struct Source {
  const std::byte* data;  // of the panel's first row
  size_t row_bytes;
  int64_t rows;  // 1 to 16
  int64_t cols;
};

// units[u][r] = unit u (4 bytes) of each row's `count` units, which start at `first` + r * stride; 16 units
// at a time, so that their 1 KB stays in the first-level cache while the rows go by
void transpose_units(const std::byte* first, size_t stride, int64_t rows, int64_t count, std::byte* units) {
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int64_t end = std::min(count, begin + 16);
    for (int64_t r = 0; r < rows; ++r) {
      const std::byte* row = first + static_cast<size_t>(r) * stride;
      for (int64_t u = begin; u < end; ++u)
        std::memcpy(units + u * packed::kUnitBytes + 4 * r, row + 4 * u, 4);
    }
  }
}

void pack_plain(const Source& s, Dtype dtype, std::byte* panel) {
  const auto size = static_cast<int64_t>(dtype_size(dtype));
  const int64_t whole = s.cols * size / 4;
  transpose_units(s.data, s.row_bytes, s.rows, whole, panel);
  if (whole * 4 == s.cols * size) return;
  for (int64_t r = 0; r < s.rows; ++r) {  // an odd number of 16-bit columns
    std::memcpy(panel + whole * packed::kUnitBytes + 4 * r,
                s.data + static_cast<size_t>(r) * s.row_bytes + whole * 4, 2);
  }
}

// Block b of a row. Blocks in files need not be aligned, so their members are read as bytes.
template <class Block>
const std::byte* block_at(const Source& s, int64_t row, int64_t b) {
  return s.data + static_cast<size_t>(row) * s.row_bytes + static_cast<size_t>(b) * sizeof(Block);
}

uint16_t read_u16(const void* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

// Q8_0 and Q4_0: a float16 scale d before the integers
template <class Block, Dtype kDtype>
void pack_simple(const Source& s, uint32_t flip, std::byte* panel) {
  constexpr packed::Group kGroup = packed::group(kDtype);
  constexpr int64_t kUnits = sizeof(Block::q) / 4;
  for (int64_t b = 0; b < s.cols / 32; ++b) {
    std::byte* const group = panel + b / 2 * kGroup.bytes;
    for (int64_t r = 0; r < s.rows; ++r) {
      std::memcpy(group + b % 2 * 32 + 2 * r, block_at<Block>(s, r, b) + offsetof(Block, d), 2);
    }
    std::byte* const to = group + kGroup.header + b % 2 * kUnits * packed::kUnitBytes;
    transpose_units(block_at<Block>(s, 0, b) + offsetof(Block, q), s.row_bytes, s.rows, kUnits, to);
    if (flip == 0) continue;
    for (int64_t i = 0; i < kUnits * kRows; ++i) {
      uint32_t unit;
      std::memcpy(&unit, to + 4 * i, 4);
      unit ^= flip;
      std::memcpy(to + 4 * i, &unit, 4);
    }
  }
}

void pack_q4_k(const Source& s, std::byte* panel) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ4_K);
  for (int64_t b = 0; b < s.cols / 256; ++b, panel += kGroup.bytes) {
    for (int64_t r = 0; r < s.rows; ++r) {
      BlockQ4_K head;  // all but the integers
      std::memcpy(&head, block_at<BlockQ4_K>(s, r, b), offsetof(BlockQ4_K, q));
      std::memcpy(panel + 2 * r, &head.d, 2);
      std::memcpy(panel + 32 + 2 * r, &head.dmin, 2);
      for (int p = 0; p < 8; ++p) {
        const quant::ScaleMin sm = quant::scale_min(head.scales, p);
        panel[64 + 32 * p + r] = static_cast<std::byte>(sm.scale);
        panel[64 + 32 * p + 16 + r] = static_cast<std::byte>(sm.min);
      }
    }
    const std::byte* first = block_at<BlockQ4_K>(s, 0, b) + offsetof(BlockQ4_K, q);
    transpose_units(first, s.row_bytes, s.rows, 32, panel + kGroup.header);
  }
}

void pack_q6_k(const Source& s, std::byte* panel) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ6_K);
  for (int64_t b = 0; b < s.cols / 256; ++b, panel += kGroup.bytes) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const std::byte* block = block_at<BlockQ6_K>(s, r, b);
      std::memcpy(panel + 2 * r, block + offsetof(BlockQ6_K, d), 2);
      for (int p = 0; p < 16; ++p)
        panel[32 + 16 * p + r] = block[offsetof(BlockQ6_K, scales) + static_cast<size_t>(p)];
    }
    const std::byte* first = block_at<BlockQ6_K>(s, 0, b);
    for (int half = 0; half < 2; ++half) {
      std::byte* to = panel + kGroup.header + half * 24 * packed::kUnitBytes;
      const std::byte* low = first + offsetof(BlockQ6_K, low) + 64 * half;
      const std::byte* high = first + offsetof(BlockQ6_K, high) + 32 * half;
      transpose_units(low, s.row_bytes, s.rows, 16, to);
      transpose_units(high, s.row_bytes, s.rows, 8, to + 16 * packed::kUnitBytes);
    }
  }
}

void pack_panel(const Source& s, Dtype dtype, std::byte* panel) {
  // Rows and columns that are not there, and the padding of the scales
  std::memset(panel, 0, static_cast<size_t>(packed::panel_bytes(dtype, s.cols)));
  switch (dtype) {
    case Dtype::kQ8_0:
      return pack_simple<BlockQ8_0, Dtype::kQ8_0>(s, 0x80808080u, panel);
    case Dtype::kQ4_0:
      return pack_simple<BlockQ4_0, Dtype::kQ4_0>(s, 0, panel);
    case Dtype::kQ4_K:
      return pack_q4_k(s, panel);
    case Dtype::kQ6_K:
      return pack_q6_k(s, panel);
    default:
      return pack_plain(s, dtype, panel);
  }
}

// Element (r, c) of a panel.
float unpack_one(Dtype dtype, const std::byte* panel, int64_t r, int64_t c) {
  const packed::Group g = packed::group(dtype);
  const std::byte* const group = panel + c / g.columns * g.bytes;
  const std::byte* const units = group + g.header;
  c %= g.columns;
  const auto byte_at = [&](int64_t unit, int64_t i) {
    return std::to_integer<int>(units[unit * packed::kUnitBytes + 4 * r + i]);
  };
  const auto f16_at = [](const std::byte* p) { return to_float(Float16{read_u16(p)}); };
  switch (dtype) {
    case Dtype::kF32: {
      float x;
      std::memcpy(&x, units + c * packed::kUnitBytes + 4 * r, 4);
      return x;
    }
    case Dtype::kBF16:
      return to_float(BFloat16{read_u16(units + c / 2 * packed::kUnitBytes + 4 * r + c % 2 * 2)});
    case Dtype::kF16:
      return f16_at(units + c / 2 * packed::kUnitBytes + 4 * r + c % 2 * 2);
    case Dtype::kQ8_0:
      return f16_at(group + c / 32 * 32 + 2 * r) * static_cast<float>(byte_at(c / 4, c % 4) - 128);
    case Dtype::kQ4_0: {
      const int n = byte_at(c / 32 * 4 + c % 16 / 4, c % 4) >> (c % 32 < 16 ? 0 : 4) & 15;
      return f16_at(group + c / 32 * 32 + 2 * r) * static_cast<float>(n - 8);
    }
    case Dtype::kQ4_K: {
      const std::byte* part = group + 64 + c / 32 * 32;
      const auto scale = static_cast<float>(std::to_integer<int>(part[r]));
      const auto least = static_cast<float>(std::to_integer<int>(part[16 + r]));
      const int n = byte_at(c / 64 * 8 + c % 32 / 4, c % 4) >> (c % 64 < 32 ? 0 : 4) & 15;
      return f16_at(group + 2 * r) * scale * static_cast<float>(n) - f16_at(group + 32 + 2 * r) * least;
    }
    default: {  // Q6_K
      const int64_t quarter = c % 128 / 32;
      const int64_t unit = c / 128 * 24;
      const int low = byte_at(unit + quarter % 2 * 8 + c % 32 / 4, c % 4) >> (quarter < 2 ? 0 : 4) & 15;
      const int high = byte_at(unit + 16 + c % 32 / 4, c % 4) >> (2 * quarter) & 3;
      const auto scale = static_cast<int8_t>(group[32 + c / 16 * 16 + r]);
      return f16_at(group + 2 * r) * static_cast<float>(scale) * static_cast<float>((low | high << 4) - 32);
    }
  }
}

}  // namespace

size_t packed_bytes(Dtype dtype, int64_t rows, int64_t cols) {
  return static_cast<size_t>((rows + kRows - 1) / kRows) *
         static_cast<size_t>(packed::panel_bytes(dtype, cols));
}

void pack_weights(Dtype dtype, const void* stored, [[maybe_unused]] int64_t rows, int64_t cols,
                  int64_t row_begin, int64_t row_end, void* packed) {
  KILIN_ASSERT(cols % dtype_block(dtype) == 0);
  KILIN_ASSERT(row_begin % kRows == 0 && (row_end % kRows == 0 || row_end == rows));
  const size_t row_bytes = dtype_bytes(dtype, cols);
  const auto panel_bytes = static_cast<size_t>(packed::panel_bytes(dtype, cols));
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    const Source source{static_cast<const std::byte*>(stored) + static_cast<size_t>(row) * row_bytes,
                        row_bytes, std::min(kRows, row_end - row), cols};
    pack_panel(source, dtype,
               static_cast<std::byte*>(packed) + static_cast<size_t>(row / kRows) * panel_bytes);
  }
}

void unpack_row(const WeightMatrix& w, int64_t row, float* out) {
  KILIN_ASSERT(row >= 0 && row < w.rows);
  const auto* panel =
      static_cast<const std::byte*>(w.data) + row / kRows * packed::panel_bytes(w.dtype, w.cols);
  for (int64_t c = 0; c < w.cols; ++c) out[c] = unpack_one(w.dtype, panel, row % kRows, c);
}

}  // namespace kilin
