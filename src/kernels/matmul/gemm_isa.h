// SPDX-License-Identifier: Apache-2.0
// Serial matrix products for kernels that are compiled once per instruction set (include only from *_isa.cc).
//
// Outer-product form: a tile of kMr rows of A times kNr columns of B is kept in registers; each step
// broadcasts kMr values of A and loads kNr / kLanes vectors of B. With 32 registers 12 x 2 accumulators take
// 24, two hold B, and 24 FMA per 14 loads keep both FMA ports busy (2 loads a cycle); with 16 registers it is
// 6 x 2.
#pragma once
#include "kernels/cpu/vec.h"

namespace kilin::KILIN_ISA {

inline constexpr int kMr = kRegisters == 32 ? 12 : 6;
inline constexpr int kNr = 2 * kLanes;

// C[M x kNr] (+)= A[M x depth] B[depth x kNr], B rows ldb apart and readable over kNr columns
template <int M, bool kAccumulate>
KILIN_INLINE void gemm_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                            Vec (&acc)[M][2]) {
  if constexpr (!kAccumulate) {
    for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * ldb);
    const Vec b1 = load(b + k * ldb + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Vec ai = splat(a[i * lda + k]);
      acc[i][0] += ai * b0;
      acc[i][1] += ai * b1;
    }
  }
}

// One tile of C with M rows and n <= kNr columns.
template <int M>
KILIN_INLINE void gemm_store_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                                  float* c, int64_t ldc, int n, bool accumulate) {
  Vec acc[M][2];
  gemm_tile<M, false>(depth, a, lda, b, ldb, acc);
  const int n0 = n < kLanes ? n : kLanes;
  const int n1 = n - n0;
  for (int i = 0; i < M; ++i) {
    float* row = c + i * ldc;
    if (n == kNr) {
      if (accumulate) {
        acc[i][0] += load(row);
        acc[i][1] += load(row + kLanes);
      }
      store(row, acc[i][0]);
      store(row + kLanes, acc[i][1]);
    } else {
      if (accumulate) {
        acc[i][0] += load_part(row, n0);
        acc[i][1] += load_part(row + n0, n1);
      }
      store_part(row, acc[i][0], n0);
      if (n1 > 0) store_part(row + n0, acc[i][1], n1);
    }
  }
}

// The tile of `rows` <= kMr rows: one instantiation for each height, so that no row is left to a slow
// remainder.
template <int M = kMr>
KILIN_INLINE void gemm_rows(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                            int64_t ldb, float* c, int64_t ldc, int n, bool accumulate) {
  if constexpr (M > 1) {
    if (rows < M) return gemm_rows<M - 1>(rows, depth, a, lda, b, ldb, c, ldc, n, accumulate);
  }
  gemm_store_tile<M>(depth, a, lda, b, ldb, c, ldc, n, accumulate);
}

// C[m x n] (+)= A[m x depth] B[depth x n], n <= kNr, B readable over kNr columns in every row. The rows are
// cut into tiles of equal height (64 rows: 11 11 11 11 10 10, not five of 12 and one of 4, which would run at
// a third of the speed).
static inline void gemm_panel(int64_t m, int n, int64_t depth, const float* a, int64_t lda, const float* b,
                              int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t tiles = (m + kMr - 1) / kMr;
  for (int64_t i = 0; i < m; --tiles) {
    const int64_t rows = (m - i + tiles - 1) / tiles;
    gemm_rows(rows, depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, n, accumulate);
    i += rows;
  }
}

}  // namespace kilin::KILIN_ISA
