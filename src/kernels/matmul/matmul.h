// SPDX-License-Identifier: Apache-2.0
// Matrix products with stored weights: y[t][r] = sum_c x[t][c] w[r][c], x and y float32, w float32, float16
// or bfloat16 read where it lies (a mapped file), accumulation in float32.
#pragma once
#include <cstdint>
#include <span>

#include "base/thread_pool.h"
#include "tensor/dtype.h"

namespace kilin {

// Row-major [rows][cols] as torch's Linear stores it (rows = outputs). `data` need not be aligned.
struct WeightMatrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;  // kF32, kF16 or kBF16
  int64_t rows = 0;
  int64_t cols = 0;

  size_t bytes() const { return static_cast<size_t>(rows) * static_cast<size_t>(cols) * dtype_size(dtype); }
};

struct MatmulJob {
  int64_t tokens = 0;
  const float* x = nullptr;  // [tokens][x_stride >= w.cols]
  int64_t x_stride = 0;
  WeightMatrix w;
  float* y = nullptr;  // [tokens][y_stride >= w.rows]
  int64_t y_stride = 0;
};

// All jobs in one parallel region (projections of the same input, experts with their own tokens). Sums run
// over c in an order that depends on `tokens` being above kMatmulDotTokens, but not on the number of threads.
void matmul(std::span<const MatmulJob> jobs, ThreadPool& pool);

// Up to this many tokens each weight row is read once as dot products (memory bound); above, panels of
// weights are widened and packed for a register-blocked product (compute bound).
inline constexpr int64_t kMatmulDotTokens = 16;

// row[0..w.cols) = the given row of w as float32
void widen_row(const WeightMatrix& w, int64_t row, float* out);

}  // namespace kilin
