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
#include "kernels/kda/kda_chunk_simd.h"

namespace kilin::KILIN_ISA {
namespace {

// out = (q D) S^T + P U for the rows [0, n) and `width` columns of a panel
void answer(const KdaParams& p, const Chunk& c, const float* s, float* out, int n, int width) {
  for (int i = 0; i < n; i += kRows) {
    Vec acc[kRows][2] = {};
    multiply_tile(acc, c.x + (kC + i) * c.padded, c.padded, s, p.key_dim);
    multiply_tile(acc, c.p + i * kC, kC, c.u, i + kRows);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (i + r < n) store_columns(out + (i + r) * p.out_stride, width, acc[r]);
    }
  }
}

// One chunk of n tokens of one head.
void chunk_head(const KdaParams& p, const Head& head, const KdaTask& task, int64_t token, int n,
                const Chunk& c) {
  std::memset(c.lower, 0, sizeof(float) * 2 * kC * kC);
  if (n < kC) std::memset(c.keys, 0, sizeof(float) * 3 * kC * static_cast<unsigned>(c.padded));
  const int64_t end = p.cu_seqlens[task.sequence + 1];
  for (int i = 0; i < n; ++i) {
    if (token + kC + i < end) prefetch_row(p, head, task.value_begin, task.value_end, token + kC + i);
    add_row(p, head, token + i, i, c);
  }
  const int values = task.value_end - task.value_begin;
  const int64_t column = static_cast<int64_t>(head.value_head) * p.value_dim + task.value_begin;
  float* s = c.panels;
  for (int first = 0; first < values; first += kPanel, s += static_cast<int64_t>(c.padded) * kPanel) {
    const int width = values - first < kPanel ? values - first : kPanel;
    right_side<false>(p, c, s, p.v + token * p.v_stride + column + first, n, width, nullptr);
    substitute(c.lower, c.u);
    answer(p, c, s, p.out + token * p.out_stride + column + first, n, width);
    update(p, c, s, s, n);
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
}

}  // namespace kilin::KILIN_ISA
