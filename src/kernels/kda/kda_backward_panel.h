// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda, compiled once per instruction set: the matrix products of the gradients of one
// chunk with one panel of values. The formulas are in kda_backward_isa.cc.
#pragma once
#include "kernels/kda/kda_backward_simd.h"

namespace kilin::KILIN_ISA {

inline constexpr int kTokenVecs = kC / kLanes;  // vectors of the tokens of a chunk
// Rows of a register tile with 1 and with 2 times kTokenVecs columns
inline constexpr int kNarrowRows = kRegisters == 32 ? 16 : 8 / kTokenVecs;
inline constexpr int kWideRows = kRegisters == 32 ? 8 : 4 / kTokenVecs;

// Rows [C][kPanel] of one panel
struct PanelRows {
  float* d_out;
  float* u;
  float* w;
  float* minus_dv;
  float* ut;        // [kPanel][C] U^T
  float* from_out;  // [kPanel][2][C] -dv^T and dO^T
};

static inline PanelRows make_rows(Carver& memory) {
  PanelRows rows{};
  rows.d_out = memory.take(kC * kPanel);
  rows.u = memory.take(kC * kPanel);
  rows.w = memory.take(kC * kPanel);
  rows.minus_dv = memory.take(kC * kPanel);
  rows.ut = memory.take(kC * kPanel);
  rows.from_out = memory.take(2 * kC * kPanel);
  return rows;
}

// acc[r][n] += sum_v a[r][v] b[v][n]
template <int R, int N>
KILIN_INLINE void outer_tile(Vec (&acc)[R][N], const float* a, int a_stride, const float* b) {
  for (int v = 0; v < kPanel; ++v) {
    Vec column[N];
    for (int n = 0; n < N; ++n) column[n] = load(b + (v * N + n) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec factor = splat(a[r * a_stride + v]);
      for (int n = 0; n < N; ++n) acc[r][n] += factor * column[n];
    }
  }
}

// to [rows][N kLanes] (+)= a [rows][kPanel] b
template <int R, int N>
static inline void multiply_columns(const float* a, const float* b, int rows, bool add, float* to) {
  for (int k = 0; k < rows; k += R) {
    Vec acc[R][N] = {};
    float* out = to + k * N * kLanes;
    if (add) {
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) acc[r][n] = load(out + (r * N + n) * kLanes);
      }
    }
    outer_tile(acc, a + k * kPanel, kPanel, b);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) store(out + (r * N + n) * kLanes, acc[r][n]);
    }
  }
}

// to[j][i] = from[i][j] for i < rows and j < columns, multiples of kLanes
static inline void transpose_rows(const float* from, int from_stride, int rows, int columns, float* to,
                                  int to_stride) {
  for (int j = 0; j < columns; j += kLanes) {
    for (int i = 0; i < rows; i += kLanes) {
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = load(from + (i + r) * from_stride + j);
      transpose(block);
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_stride + i, block[r]);
    }
  }
}

// w <- (I + L)^-T w: row j of L, whose negative is `lower`, once row j of w is done.
static inline void substitute_back(const float* lower, float* w) {
  for (int h = 0; h < 2; ++h) {
    Vec row[kC];
    for (int i = 0; i < kC; ++i) row[i] = load(w + i * kPanel + h * kLanes);
#pragma GCC unroll 16
    for (int j = kC - 1; j > 0; --j) {
#pragma GCC unroll 16
      for (int i = 0; i < j; ++i) row[i] += splat(lower[j * kC + i]) * row[j];
    }
    for (int i = 0; i < kC; ++i) store(w + i * kPanel + h * kLanes, row[i]);
  }
}

// w = (I + L)^-T (P^T dO + kt H)
static inline void pseudo_gradient(const KdaParams& p, const BackwardChunk& c, const PanelRows& rows,
                                   const float* h) {
  for (int i = 0; i < kC; i += kRows) {
    Vec acc[kRows][2] = {};
    multiply_tile(acc, c.kt + i * c.padded, c.padded, h, p.key_dim);
    multiply_tile(acc, c.pt + i * kC, kC, rows.d_out, kC);
    for (int r = 0; r < kRows; ++r) {
      store(rows.w + (i + r) * kPanel, acc[r][0]);
      store(rows.w + (i + r) * kPanel + kLanes, acc[r][1]);
    }
  }
  substitute_back(c.lower, rows.w);
}

// d_total (+)= row sums of s h
static inline void add_total(const BackwardChunk& c, const float* s, const float* h, bool add) {
  for (int k = 0; k < c.padded; k += 4) {
    Vec sum[4];
    for (int r = 0; r < 4; ++r) {
      const int at = (k + r) * kPanel;
      sum[r] = load(s + at) * load(h + at) + load(s + at + kLanes) * load(h + at + kLanes);
    }
    Vec4 sums = reduce4(sum[0], sum[1], sum[2], sum[3]);
    Vec4 before{};
    if (add) std::memcpy(&before, c.d_total + k, sizeof before);
    sums += before;
    std::memcpy(c.d_total + k, &sums, sizeof sums);
  }
}

// H <- H diag(D_C) + dO^T (q D) - dv^T (k D)
static inline void update_gradient(const BackwardChunk& c, const PanelRows& rows, float* h) {
  for (int k = 0; k < c.padded; k += kRows) {
    Vec acc[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      const Vec total = splat(c.total[k + r]);
      acc[r][0] = total * load(h + (k + r) * kPanel);
      acc[r][1] = total * load(h + (k + r) * kPanel + kLanes);
    }
    for (int half = 0; half < 2; ++half) {
      const float* values = half == 0 ? rows.minus_dv : rows.d_out;
      const float* x = c.x + half * kC * c.padded + k;
      for (int j = 0; j < kC; ++j) {
        const Vec v0 = load(values + j * kPanel);
        const Vec v1 = load(values + j * kPanel + kLanes);
        for (int r = 0; r < kRows; ++r) {
          const Vec factor = splat(x[j * c.padded + r]);
          acc[r][0] += factor * v0;
          acc[r][1] += factor * v1;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(h + (k + r) * kPanel, acc[r][0]);
      store(h + (k + r) * kPanel + kLanes, acc[r][1]);
    }
  }
}

}  // namespace kilin::KILIN_ISA
