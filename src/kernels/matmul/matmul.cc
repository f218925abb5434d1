// SPDX-License-Identifier: Apache-2.0
#include "kernels/matmul/matmul.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin {
namespace {

// Weight bytes of one piece of work in the dot-product form: enough to hide the hand-out of the piece (about
// 0.1 us), small enough to balance the threads.
constexpr int64_t kRowPieceBytes = 64 * 1024;

struct Piece {
  const MatmulJob* job;
  int64_t row_begin;
  int64_t row_end;
  bool dot;
};

thread_local std::vector<Piece> pieces;
thread_local std::vector<float> pack_buffer;

void add_pieces(const MatmulJob& job, int64_t panel_rows, size_t threads, std::vector<Piece>& list) {
  if (job.tokens == 0 || job.w.rows == 0) return;
  const bool dot = job.tokens <= kMatmulDotTokens;
  int64_t step = panel_rows;
  if (dot) {
    const int64_t row_bytes =
        std::max<int64_t>(1, job.w.cols * static_cast<int64_t>(dtype_size(job.w.dtype)));
    const int64_t per_thread =
        (job.w.rows + static_cast<int64_t>(threads) - 1) / static_cast<int64_t>(threads);
    step = std::clamp<int64_t>(kRowPieceBytes / row_bytes, 4, std::max<int64_t>(4, per_thread)) / 4 * 4;
  }
  for (int64_t r = 0; r < job.w.rows; r += step) {
    list.push_back({&job, r, std::min(job.w.rows, r + step), dot});
  }
}

}  // namespace

void matmul(std::span<const MatmulJob> jobs, ThreadPool& pool) {
  // Resolved once: active_isa() is read here, not in the workers.
  const auto rows = KILIN_DISPATCH(matmul_rows);
  const auto panel = KILIN_DISPATCH(matmul_panel);
  const int64_t panel_rows = KILIN_DISPATCH(matmul_panel_rows)();
  const auto pack_floats = static_cast<size_t>(KILIN_DISPATCH(matmul_pack_floats)());
  std::vector<Piece> list = std::move(pieces);
  list.clear();
  for (const MatmulJob& job : jobs) add_pieces(job, panel_rows, static_cast<size_t>(pool.size()), list);
  pool.parallel_for(static_cast<int64_t>(list.size()), [&](int64_t i, int) {
    const Piece& piece = list[static_cast<size_t>(i)];
    if (piece.dot) {
      rows(*piece.job, piece.row_begin, piece.row_end);
    } else {
      if (pack_buffer.size() < pack_floats) pack_buffer.resize(pack_floats);
      panel(*piece.job, piece.row_begin, piece.row_end, pack_buffer.data());
    }
  });
  pieces = std::move(list);
}

void widen_row(const WeightMatrix& w, int64_t row, float* out) {
  KILIN_ASSERT(row >= 0 && row < w.rows);
  KILIN_DISPATCH(widen)(w, row, out);
}

}  // namespace kilin
