// SPDX-License-Identifier: Apache-2.0
// Matrix products with packed weights: y[t][r] = sum_c x[t][c] w[r][c], x and y float32.
//
// Weights are packed once at load (pack_weights) into panels of 16 rows whose elements lie in the order the
// kernels read them; the packed form takes the bytes of the stored one (rows rounded up to 16, columns to
// 32). Accuracy does not depend on the weight type: activations are used in float32, as two bfloat16 terms
// (AMX) or as 16-bit integers with a scale per 32 (integer weights), all within 2^-16 of the largest of 32
// neighbours.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/thread_pool.h"
#include "tensor/dtype.h"

namespace kilin {

// A packed matrix, rows = outputs. The memory belongs to somebody else.
struct WeightMatrix {
  const void* data = nullptr;  // what pack_weights() wrote, 64-byte aligned
  Dtype dtype = Dtype::kF32;   // kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_K or kQ6_K
  int64_t rows = 0;
  int64_t cols = 0;  // a multiple of dtype_block(dtype)
};

inline constexpr int64_t kPanelRows = 16;
inline constexpr size_t kPackAlignment = 64;

// Bytes that pack_weights writes.
size_t packed_bytes(Dtype dtype, int64_t rows, int64_t cols);
// Packs rows [row_begin, row_end) of a stored row-major matrix [rows][cols] (torch's Linear, ggml's blocks
// along a row; need not be aligned) to their place in `packed`. row_begin is a multiple of kPanelRows,
// row_end too or the last row: pieces may be packed by different threads.
void pack_weights(Dtype dtype, const void* stored, int64_t rows, int64_t cols, int64_t row_begin,
                  int64_t row_end, void* packed);
// row[0..w.cols) = the given row of a packed matrix as float32
void unpack_row(const WeightMatrix& w, int64_t row, float* out);

struct MatmulJob {
  int64_t tokens = 0;
  const float* x = nullptr;  // [tokens][x_stride >= w.cols]
  int64_t x_stride = 0;
  WeightMatrix w;
  float* y = nullptr;  // [tokens][y_stride >= w.rows]
  int64_t y_stride = 0;
  // [tokens] or null: token t reads row x_rows[t] of x (the tokens of an expert) instead of row t
  const int32_t* x_rows = nullptr;
  // Rows that x has, if jobs with x_rows choose most of them together: then they may be prepared once for
  // all.
  int64_t x_count = 0;
};

// Whether activations may be rounded: with quantised weights to 8 bits for the largest of 32 neighbours
// (1 / 254), in jobs of many tokens (from 17) with BF16 weights to bfloat16 (2^-8). It happens only where the
// machine multiplies them faster so: AVX-512 without AMX, for BF16 weights with fast_bf16_products().
enum class Activations { kExact, kRounded };
// Whether they are rounded with weights of this type, on this machine.
bool rounds(Dtype weights, Activations activations);

// All jobs in one parallel region (projections of the same input, experts with their own tokens, heads). Sums
// run over c in an order that depends on the instruction set and on the number of tokens, but not on the
// number of threads. A NaN or infinity in x makes the sums of its token NaN or infinite.
void matmul(std::span<const MatmulJob> jobs, ThreadPool& pool, Activations activations = Activations::kExact);

}  // namespace kilin
