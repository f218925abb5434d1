// SPDX-License-Identifier: Apache-2.0
#include "kernels/norm/norm.h"

#include <algorithm>

#include "kernels/norm/norm_isa.h"

namespace kilin {
namespace {

// Values of one piece of elementwise work: below it one thread is done before a second has woken.
constexpr int64_t kPieceValues = 16 * 1024;

// body(begin, end) over pieces of [0, rows), each of about kPieceValues values
template <class Body>
void for_rows(int64_t rows, int64_t width, ThreadPool& pool, const Body& body) {
  const int64_t step = std::max<int64_t>(1, kPieceValues / std::max<int64_t>(1, width));
  pool.parallel_for((rows + step - 1) / step,
                    [&](int64_t i, int) { body(i * step, std::min(rows, (i + 1) * step)); });
}

}  // namespace

void rms_norm(int64_t tokens, int64_t width, const float* x, int64_t x_stride, const float* w, float eps,
              float* y, int64_t y_stride, ThreadPool& pool) {
  const auto row = KILIN_DISPATCH(rms_norm_row);
  for_rows(tokens, width, pool, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) row(width, x + t * x_stride, w, eps, y + t * y_stride);
  });
}

void gated_rms_norm(int64_t tokens, int64_t heads, int64_t width, const float* x, const float* w, float eps,
                    const float* z, GateActivation activation, float* y, ThreadPool& pool) {
  const auto norm = KILIN_DISPATCH(rms_norm_row);
  const auto gate = KILIN_DISPATCH(gate_row);
  for_rows(tokens * heads, width, pool, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      norm(width, x + r * width, w, eps, y + r * width);
      if (activation != GateActivation::kNone) gate(width, z + r * width, activation, y + r * width);
    }
  });
}

void add_in_place(int64_t n, float* x, const float* y, ThreadPool& pool) {
  const auto add = KILIN_DISPATCH(add_scaled_row);
  for_rows(n, 1, pool, [&](int64_t begin, int64_t end) { add(end - begin, 1.0f, y + begin, x + begin); });
}

void add_scaled(int64_t n, float scale, const float* y, float* x) {
  KILIN_DISPATCH(add_scaled_row)(n, scale, y, x);
}

void swiglu(int64_t n, const float* gate, const float* up, float* out, ThreadPool& pool) {
  const auto row = KILIN_DISPATCH(swiglu_row);
  for_rows(n, 4, pool,
           [&](int64_t begin, int64_t end) { row(end - begin, gate + begin, up + begin, out + begin); });
}

void silu(int64_t n, const float* x, float* y, ThreadPool& pool) {
  const auto row = KILIN_DISPATCH(silu_row);
  for_rows(n, 4, pool, [&](int64_t begin, int64_t end) { row(end - begin, x + begin, y + begin); });
}

bool all_finite(int64_t n, const float* x) { return KILIN_DISPATCH(finite_row)(n, x); }

}  // namespace kilin
