// SPDX-License-Identifier: Apache-2.0
// The chunked form: C = 16 tokens at a time, with D_i = e^(g_1 + .. + g_i) per channel inside the chunk,
//     L_ij = beta_i sum_k k_i k_j D_i/D_j   j <  i        16 x 16
//     P_ij =        sum_k q_i k_j D_i/D_j   j <= i        16 x 16
//     R    = beta (v - (k D) S^T)                         16 x V
//     U    = (I + L)^-1 R                                 forward substitution, no inverse is formed
//     O    = (q D) S^T + P U
//     S^T <- diag(D_16) S^T + (k D_16/D)^T U
// Decay ratios. D_i/D_j is never a quotient nor e to a difference of sums: when row i arrives, every earlier
// key is multiplied by e^g_i, so that row j of `keys` holds k_j D_i/D_j. All factors are in [0, 1]: any gate
// is safe (g = 0, -1000 many times, -1e30), neighbouring rows stay exact, no anchors, no special cases, and
// the only exponentials are the e^g themselves. After row 16 the same rows are the operand k D_16/D of the
// state update. With C = 16 this costs 3 operations per pair and channel, less than scaling both operands by
// exponentials and multiplying densely.
//
// Layout. The state is kept transposed for the whole sequence, in panels of kPanel = 2 vectors of values:
//     panels [panel][K rounded to 16][kPanel]   (16 KB for K = 128: a panel and the chunk's operands fit a 48
//     KB L1)
// All matrix products have the value dimension in the lanes and broadcast the other operand, so no sum
// crosses lanes and every value column is computed alike however the columns are split between threads.
#include "kernels/kda/kda_isa.h"
#include "kernels/kda/kda_simd.h"

namespace kilin::KILIN_ISA {
namespace {

inline constexpr int kC = kKdaChunk;
inline constexpr int kPanel = 2 * kLanes;
inline constexpr int kRows = kRegisters == 32 ? 8 : 4;  // rows of a register tile: kRows x 2 accumulators
static_assert(kPanel <= kKdaMaxPanel);
// Floats between rows of operands: a constant, so that the 8 rows of a tile need one pointer and no more
// registers, and an odd number of lines, so that rows spread over the sets of L1.
inline constexpr int kStride = kKdaOperandStride;

// What one thread needs for one (sequence, head): kda_scratch_floats().
struct Chunk {
  int padded;     // K rounded up to 16
  float* panels;  // the state, see above
  float* keys;    // [C][kStride] keys decayed up to the newest row
  float* x;       // [2 C][kStride] k D, then q D
  float* total;   // [padded] D of the newest row
  float* decay;   // [padded] e^g of one row
  float* query;   // [padded] q of one row
  float* lower;   // [C][C] -L, strictly lower
  float* p;       // [C][C] P, lower
  float* beta;    // [C]
  float* u;       // [C][kPanel] R, then U of one panel
};

Chunk make_chunk(float* scratch, int padded, int panels) {
  Chunk c{};
  c.padded = padded;
  c.panels = scratch;
  c.keys = c.panels + static_cast<int64_t>(panels) * padded * kPanel;
  c.x = c.keys + kC * kStride;
  c.total = c.x + 2 * kC * kStride;
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
  const float* key = c.keys + i * kStride;
  float* earlier = c.keys + j * kStride;
  Vec l[4] = {};
  Vec p[4] = {};
  for (int d = 0; d < c.padded; d += kLanes) {
    const Vec decay = load(c.decay + d);
    const Vec k = load(key + d);
    const Vec q = load(c.query + d);
    for (int r = 0; r < R; ++r) {
      const Vec decayed = load(earlier + r * kStride + d) * decay;
      store(earlier + r * kStride + d, decayed);
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
  float* key = c.keys + i * kStride;
  const float k_dot_q = prepare_keys(p, head, token, c.query, key);
  prepare_decay(p, head, token, c.decay);
  c.beta[i] = prepare_beta(p, head.value_head, token);
  for (int d = 0; d < c.padded; d += kLanes) {
    const Vec total = i == 0 ? load(c.decay + d) : load(c.total + d) * load(c.decay + d);
    store(c.total + d, total);
    store(c.x + i * kStride + d, load(key + d) * total);
    store(c.x + (kC + i) * kStride + d, load(c.query + d) * total);
  }
  intra_row(c, i);
  c.p[i * kC + i] = k_dot_q;
}

// Asks the second-level cache for the rows of the next chunk, a few lines beside each 16 steps of the
// products with the state: as one burst they fill the queue of outstanding misses and everything waits. The
// rows of one head lie a whole token apart (4 KB for 8 heads of 128), which no hardware prefetcher follows.
class Ahead {
 public:
  Ahead(const KdaParams& p, const Head& head, const KdaTask& task, int64_t token, int64_t end)
      : token_(token), end_(end < token + kC ? end : token + kC) {
    const int panels = (task.value_end - task.value_begin + kPanel - 1) / kPanel;
    const int products = panels * 2 * (kC / kRows);
    rows_ = products >= kC ? 1 : (kC + products - 1) / products;
    q_ = head.q;
    k_ = head.k;
    gate_ = p.scalar_gate ? nullptr : head.gate;
    v_ = p.v + static_cast<int64_t>(head.value_head) * p.value_dim + task.value_begin;
    values_ = task.value_end - task.value_begin;
  }
  // Line `column` of the rows that belong to the current product
  void line(const KdaParams& p, int column) const {
    for (int64_t t = token_; t < token_ + rows_ && t < end_; ++t) {
      __builtin_prefetch(q_ + t * p.q_stride + column, 0, 2);
      __builtin_prefetch(k_ + t * p.k_stride + column, 0, 2);
      if (gate_ != nullptr) __builtin_prefetch(gate_ + t * p.gate_stride + column, 0, 2);
      if (column < values_) __builtin_prefetch(v_ + t * p.v_stride + column, 0, 2);
    }
  }
  void next() { token_ += rows_; }

 private:
  int64_t token_, end_;
  int rows_, values_;
  const float *q_, *k_, *gate_, *v_;
};

// acc[r][0, 1] += sum_k x[r][k] s[k][0, 1]
template <int kXStride>
KILIN_INLINE void multiply_tile(Vec (&acc)[kRows][2], const float* x, const float* s, int begin, int end) {
  for (int k = begin; k < end; ++k) {
    const Vec s0 = load(s + k * kPanel);
    const Vec s1 = load(s + k * kPanel + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(x[r * kXStride + k]);
      acc[r][0] += factor * s0;
      acc[r][1] += factor * s1;
    }
  }
}

// The same over all channels of the state
KILIN_INLINE void multiply_state(Vec (&acc)[kRows][2], const KdaParams& p, const float* x, const float* s,
                                 Ahead& ahead) {
  for (int k = 0; k < p.key_dim; k += 16) {
    ahead.line(p, k);
    multiply_tile<kStride>(acc, x, s, k, k + 16 < p.key_dim ? k + 16 : p.key_dim);
  }
  ahead.next();
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

// Whole lines that nothing reads soon go past the caches: they need not be read before they are written.
KILIN_INLINE void stream_columns(float* row, const Vec (&value)[2]) {
#if defined(__AVX512F__)
  _mm512_stream_ps(row, reinterpret_cast<__m512>(value[0]));
  _mm512_stream_ps(row + kLanes, reinterpret_cast<__m512>(value[1]));
#else
  store(row, value[0]);
  store(row + kLanes, value[1]);
#endif
}

// u = beta (v - x S^T) for the rows [0, n) of a panel, zeros below; v has `width` columns.
void right_side(const KdaParams& p, const Chunk& c, const float* s, const float* v, int n, int width,
                Ahead& ahead) {
  for (int i = 0; i < kC; i += kRows) {
    Vec acc[kRows][2] = {};
    if (i < n) multiply_state(acc, p, c.x + i * kStride, s, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec value[2] = {};
      if (i + r < n) load_columns(v + (i + r) * p.v_stride, width, value);
      const Vec beta = splat(i + r < n ? c.beta[i + r] : 0.0f);
      store(c.u + (i + r) * kPanel, beta * (value[0] - acc[r][0]));
      store(c.u + (i + r) * kPanel + kLanes, beta * (value[1] - acc[r][1]));
    }
  }
}

// u <- (I + L)^-1 u, one vector of columns at a time: 16 rows in registers, column j of L finishes row j.
void substitute(const Chunk& c) {
  for (int h = 0; h < 2; ++h) {
    Vec row[kC];
    for (int i = 0; i < kC; ++i) row[i] = load(c.u + i * kPanel + h * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kC; ++j) {
#pragma GCC unroll 16
      for (int i = j + 1; i < kC; ++i) row[i] += splat(c.lower[i * kC + j]) * row[j];
    }
    for (int i = 0; i < kC; ++i) store(c.u + i * kPanel + h * kLanes, row[i]);
  }
}

// out = (q D) S^T + P U for the rows [0, n) and `width` columns of a panel
void answer(const KdaParams& p, const Chunk& c, const float* s, float* out, int n, int width, bool stream,
            Ahead& ahead) {
  for (int i = 0; i < n; i += kRows) {
    Vec acc[kRows][2] = {};
    multiply_state(acc, p, c.x + (kC + i) * kStride, s, ahead);
    multiply_tile<kC>(acc, c.p + i * kC, c.u, 0, i + kRows);
    if (stream && i + kRows <= n) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) stream_columns(out + (i + r) * p.out_stride, acc[r]);
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (i + r < n) store_columns(out + (i + r) * p.out_stride, width, acc[r]);
    }
  }
}

// S^T <- diag(D) S^T + keys^T U for one panel, n rows of keys
void update(const KdaParams& p, const Chunk& c, float* s, int n) {
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
        const Vec key = splat(c.keys[j * kStride + k + r]);
        acc[r][0] += key * u0;
        acc[r][1] += key * u1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(s + (k + r) * kPanel, acc[r][0]);
      store(s + (k + r) * kPanel + kLanes, acc[r][1]);
    }
  }
}

// Moves `width` rows of the state (V x K) into or out of a panel (K x kPanel). Padding in a panel is zero.
void load_panel(const float* state, int key_dim, int padded, int width, float* panel) {
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

void store_panel(const float* panel, int key_dim, int width, float* state) {
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

}  // namespace

namespace {

// One chunk of n tokens of one head.
void chunk_head(const KdaParams& p, const Head& head, const KdaTask& task, int64_t token, int n,
                const Chunk& c) {
  std::memset(c.lower, 0, sizeof(float) * 2 * kC * kC);
  if (n < kC) std::memset(c.keys, 0, sizeof(float) * 3 * kC * kStride);
  const int64_t end = p.cu_seqlens[task.sequence + 1];
  for (int i = 0; i < n; ++i) add_row(p, head, token + i, i, c);
  Ahead ahead(p, head, task, token + kC, end);
  const int values = task.value_end - task.value_begin;
  // 4 MB of results do not stay in a second-level cache until they are read
  const bool large = (end - p.cu_seqlens[task.sequence]) * p.value_heads * p.value_dim >= 1024 * 1024;
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.out_stride % 16 == 0;
  const int64_t column = static_cast<int64_t>(head.value_head) * p.value_dim + task.value_begin;
  float* s = c.panels;
  for (int first = 0; first < values; first += kPanel, s += static_cast<int64_t>(c.padded) * kPanel) {
    const int width = values - first < kPanel ? values - first : kPanel;
    right_side(p, c, s, p.v + token * p.v_stride + column + first, n, width, ahead);
    substitute(c);
    const bool stream = large && aligned && width == kPanel && (column + first) % 16 == 0;
    answer(p, c, s, p.out + token * p.out_stride + column + first, n, width, stream, ahead);
    update(p, c, s, n);
  }
}

}  // namespace

void kda_chunk_task(const KdaParams& p, const KdaTask& task, float* scratch) {
  Head heads[kKdaHeadGroup];
  Chunk chunks[kKdaHeadGroup];
  const int values = task.value_end - task.value_begin;
  const int panels = (values + kPanel - 1) / kPanel;
  const int64_t panel_floats = kda_round_up(p.key_dim, 16) * kPanel;
  const auto each_panel = [&](auto move) {
    for (int g = 0; g < task.head_count; ++g) {
      const int64_t row = static_cast<int64_t>(heads[g].value_head) * p.value_dim + task.value_begin;
      float* state = p.state + p.slots[task.sequence] * p.slot_stride + row * p.key_dim;
      for (int i = 0; i < panels; ++i) {
        const int width = values - i * kPanel < kPanel ? values - i * kPanel : kPanel;
        move(state + static_cast<int64_t>(i) * kPanel * p.key_dim, width,
             chunks[g].panels + i * panel_floats);
      }
    }
  };
  for (int g = 0; g < task.head_count; ++g) {
    heads[g] = make_head(p, task.value_head + g);
    chunks[g] = make_chunk(scratch, heads[g].padded, panels * task.head_count);
    chunks[g].panels += g * panels * panel_floats;
  }
  each_panel([&](float* state, int width, float* panel) {
    load_panel(state, p.key_dim, heads[0].padded, width, panel);
  });
  const int64_t end = p.cu_seqlens[task.sequence + 1];
  for (int64_t t = p.cu_seqlens[task.sequence]; t < end; t += kC) {
    const int n = end - t < kC ? static_cast<int>(end - t) : kC;
    for (int g = 0; g < task.head_count; ++g) chunk_head(p, heads[g], task, t, n, chunks[g]);
  }
  each_panel([&](float* state, int width, float* panel) { store_panel(panel, p.key_dim, width, state); });
#if defined(__AVX512F__)
  _mm_sfence();  // streamed results, before another thread is told that they are there
#endif
}

}  // namespace kilin::KILIN_ISA
