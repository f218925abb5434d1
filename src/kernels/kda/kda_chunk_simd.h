// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda, compiled once per instruction set: what the chunked forward pass and the gradients
// share: the operands of a chunk that do not depend on the state, and products with panels of the state. The
// method is explained in kda_chunk_isa.cc.
#pragma once
#include "kernels/kda/kda_isa.h"
#include "kernels/kda/kda_simd.h"

namespace kilin::KILIN_ISA {

inline constexpr int kC = kKdaChunk;
inline constexpr int kPanel = 2 * kLanes;
inline constexpr int kRows = kRegisters == 32 ? 8 : 4;  // rows of a register tile: kRows x 2 accumulators
static_assert(kPanel <= kKdaMaxPanel);

// What one thread needs for one (sequence, head): kda_scratch_floats().
struct Chunk {
  int padded;     // K rounded up to 16
  float* panels;  // the state, see above
  float* keys;    // [C][padded] keys decayed up to the newest row
  float* x;       // [2 C][padded] k D, then q D
  float* total;   // [padded] D of the newest row
  float* decay;   // [padded] e^g of one row
  float* query;   // [padded] q of one row
  float* lower;   // [C][C] -L, strictly lower
  float* p;       // [C][C] P, lower
  float* beta;    // [C]
  float* u;       // [C][kPanel] R, then U of one panel
};

static inline Chunk make_chunk(float* scratch, int padded, int panels) {
  Chunk c{};
  c.padded = padded;
  c.panels = scratch;
  c.keys = c.panels + static_cast<int64_t>(panels) * padded * kPanel;
  c.x = c.keys + kC * padded;
  c.total = c.x + 2 * kC * padded;
  c.decay = c.total + padded;
  c.query = c.decay + padded;
  c.lower = c.query + padded;
  c.p = c.lower + kC * kC;
  c.beta = c.p + kC * kC;
  c.u = c.beta + kC;
  return c;
}

// Rows j to j + R - 1 of the keys against row i: decays them by e^g_i, then L_ij and P_ij. The entries up to
// j + 3 that are no earlier rows become zero.
template <int R>
KILIN_INLINE void intra_block(const Chunk& c, int i, int j) {
  const float* key = c.keys + i * c.padded;
  float* earlier = c.keys + j * c.padded;
  Vec l[4] = {};
  Vec p[4] = {};
  for (int d = 0; d < c.padded; d += kLanes) {
    const Vec decay = load(c.decay + d);
    const Vec k = load(key + d);
    const Vec q = load(c.query + d);
    for (int r = 0; r < R; ++r) {
      const Vec decayed = load(earlier + r * c.padded + d) * decay;
      store(earlier + r * c.padded + d, decayed);
      l[r] += decayed * k;
      p[r] += decayed * q;
    }
  }
  const Vec4 l4 = reduce4(l[0], l[1], l[2], l[3]) * -c.beta[i];
  const Vec4 p4 = reduce4(p[0], p[1], p[2], p[3]);
  std::memcpy(c.lower + i * kC + j, &l4, sizeof l4);
  std::memcpy(c.p + i * kC + j, &p4, sizeof p4);
}

// Row i of L and of P below the diagonal. Four earlier rows at a time share the loads of row i.
KILIN_INLINE void intra_row(const Chunk& c, int i) {
  int j = 0;
  for (; j + 4 <= i; j += 4) intra_block<4>(c, i, j);
  if (i - j == 1) intra_block<1>(c, i, j);
  if (i - j == 2) intra_block<2>(c, i, j);
  if (i - j == 3) intra_block<3>(c, i, j);
}

// Reads row i of the chunk and makes everything of it that does not depend on the state.
KILIN_INLINE void add_row(const KdaParams& p, const Head& head, int64_t token, int i, const Chunk& c) {
  float* key = c.keys + i * c.padded;
  const float k_dot_q = prepare_keys(p, head, token, c.query, key);
  prepare_decay(p, head, token, c.decay);
  c.beta[i] = prepare_beta(p, head.value_head, token);
  for (int d = 0; d < c.padded; d += kLanes) {
    const Vec total = i == 0 ? load(c.decay + d) : load(c.total + d) * load(c.decay + d);
    store(c.total + d, total);
    store(c.x + i * c.padded + d, load(key + d) * total);
    store(c.x + (kC + i) * c.padded + d, load(c.query + d) * total);
  }
  intra_row(c, i);
  c.p[i * kC + i] = k_dot_q;
}

// acc[r][0, 1] += sum_k x[r][k] s[k][0, 1]
KILIN_INLINE void multiply_tile(Vec (&acc)[kRows][2], const float* x, int64_t x_stride, const float* s,
                                int depth) {
  for (int k = 0; k < depth; ++k) {
    const Vec s0 = load(s + k * kPanel);
    const Vec s1 = load(s + k * kPanel + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(x[r * x_stride + k]);
      acc[r][0] += factor * s0;
      acc[r][1] += factor * s1;
    }
  }
}

// The first `width` (1 to kPanel) columns of a panel's row
KILIN_INLINE void load_columns(const float* row, int width, Vec (&value)[2]) {
  if (width == kPanel) {
    value[0] = load(row);
    value[1] = load(row + kLanes);
  } else {
    value[0] = load_row(row, 0, width);
    value[1] = load_row(row, kLanes, width);
  }
}

KILIN_INLINE void store_columns(float* row, int width, const Vec (&value)[2]) {
  if (width == kPanel) {
    store(row, value[0]);
    store(row + kLanes, value[1]);
    return;
  }
  store_part(row, value[0], width < kLanes ? width : kLanes);
  if (width > kLanes) store_part(row + kLanes, value[1], width - kLanes);
}

// u = beta (v - x S^T) for the rows [0, n) of a panel, zeros below; v has `width` columns. With kKeep the
// rows of v - x S^T go to `residual` [C][kPanel].
template <bool kKeep>
static inline void right_side(const KdaParams& p, const Chunk& c, const float* s, const float* v, int n,
                              int width, float* residual) {
  for (int i = 0; i < kC; i += kRows) {
    Vec acc[kRows][2] = {};
    if (i < n) multiply_tile(acc, c.x + i * c.padded, c.padded, s, p.key_dim);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec value[2] = {};
      if (i + r < n) load_columns(v + (i + r) * p.v_stride, width, value);
      const Vec beta = splat(i + r < n ? c.beta[i + r] : 0.0f);
      value[0] -= acc[r][0];
      value[1] -= acc[r][1];
      if (kKeep) {
        store(residual + (i + r) * kPanel, value[0]);
        store(residual + (i + r) * kPanel + kLanes, value[1]);
      }
      store(c.u + (i + r) * kPanel, beta * value[0]);
      store(c.u + (i + r) * kPanel + kLanes, beta * value[1]);
    }
  }
}

// u <- (I + L)^-1 u, one vector of columns at a time: 16 rows in registers, column j of L finishes row j.
// `lower` is -L.
static inline void substitute(const float* lower, float* u) {
  for (int h = 0; h < 2; ++h) {
    Vec row[kC];
    for (int i = 0; i < kC; ++i) row[i] = load(u + i * kPanel + h * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kC; ++j) {
#pragma GCC unroll 16
      for (int i = j + 1; i < kC; ++i) row[i] += splat(lower[i * kC + j]) * row[j];
    }
    for (int i = 0; i < kC; ++i) store(u + i * kPanel + h * kLanes, row[i]);
  }
}

// to = diag(D) S^T + keys^T U for one panel s (which may be `to`), n rows of keys
static inline void update(const KdaParams& p, const Chunk& c, const float* s, float* to, int n) {
  for (int k = 0; k < p.key_dim; k += kRows) {
    Vec acc[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      const Vec total = splat(c.total[k + r]);
      acc[r][0] = total * load(s + (k + r) * kPanel);
      acc[r][1] = total * load(s + (k + r) * kPanel + kLanes);
    }
    for (int j = 0; j < n; ++j) {
      const Vec u0 = load(c.u + j * kPanel);
      const Vec u1 = load(c.u + j * kPanel + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec key = splat(c.keys[j * c.padded + k + r]);
        acc[r][0] += key * u0;
        acc[r][1] += key * u1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(to + (k + r) * kPanel, acc[r][0]);
      store(to + (k + r) * kPanel + kLanes, acc[r][1]);
    }
  }
}

// Moves `width` rows of the state (V x K) into or out of a panel (K x kPanel). Padding in a panel is zero.
static inline void load_panel(const float* state, int key_dim, int padded, int width, float* panel) {
  std::memset(panel, 0, sizeof(float) * static_cast<unsigned>(padded * kPanel));
  const int v4 = width / 4 * 4;
  const int k4 = key_dim / 4 * 4;
  for (int v = 0; v < v4; v += 4) {
    for (int k = 0; k < k4; k += 4) {
      transpose4(state + static_cast<int64_t>(v) * key_dim + k, key_dim, panel + k * kPanel + v, kPanel);
    }
  }
  for (int v = 0; v < width; ++v) {
    for (int k = v < v4 ? k4 : 0; k < key_dim; ++k)
      panel[k * kPanel + v] = state[static_cast<int64_t>(v) * key_dim + k];
  }
}

static inline void store_panel(const float* panel, int key_dim, int width, float* state) {
  const int v4 = width / 4 * 4;
  const int k4 = key_dim / 4 * 4;
  for (int v = 0; v < v4; v += 4) {
    for (int k = 0; k < k4; k += 4) {
      transpose4(panel + k * kPanel + v, kPanel, state + static_cast<int64_t>(v) * key_dim + k, key_dim);
    }
  }
  for (int v = 0; v < width; ++v) {
    for (int k = v < v4 ? k4 : 0; k < key_dim; ++k)
      state[static_cast<int64_t>(v) * key_dim + k] = panel[k * kPanel + v];
  }
}

}  // namespace kilin::KILIN_ISA
