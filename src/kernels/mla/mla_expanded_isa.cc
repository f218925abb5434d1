// SPDX-License-Identifier: Apache-2.0
// The expanded order: queries [nope + rope] of one head against keys and values of that head, multiplied out
// by the caller. Register tiles of 12 queries x 2 vectors of keys (scores) or values (sums); a panel of keys
// lies transposed, depth by depth, as the score tile reads it.
#include "kernels/matmul/gemm_isa.h"
#include "kernels/mla/mla_simd.h"

namespace kilin::KILIN_ISA {
namespace {

// to[c * kMlaPanelKeys + i] = from[i * stride + c] for c < depth and i < rows; columns from `rows` on are
// zero.
void transpose_rows(int64_t rows, int64_t depth, const float* from, int64_t stride, float* to) {
  for (int64_t i = 0; i < kMlaPanelKeys; i += kLanes) {
    int64_t c = 0;
    if (i + kLanes <= rows) {
      for (; c + kLanes <= depth; c += kLanes) {
        Vec block[kLanes];
        for (int k = 0; k < kLanes; ++k) block[k] = load(from + (i + k) * stride + c);
        transpose(block);
        for (int k = 0; k < kLanes; ++k) store(to + (c + k) * kMlaPanelKeys + i, block[k]);
      }
    }
    for (; c < depth; ++c) {
      for (int64_t k = i; k < i + kLanes; ++k)
        to[c * kMlaPanelKeys + k] = k < rows ? from[k * stride + c] : 0;
    }
  }
}

// The block's queries, scaled, side by side.
void gather_queries(const MlaParams& p, const MlaQueries& t, float* to) {
  const int64_t depth = p.nope + p.rope;
  const Vec factor = splat(p.scale);
  for (int64_t q = t.q_begin; q < t.q_end; ++q) {
    const float* from = p.q + ((t.sequence->first + q) * p.heads + t.head) * depth;
    float* row = to + (q - t.q_begin) * mla_padded(depth);
    int64_t c = 0;
    for (; c + kLanes <= depth; c += kLanes) store(row + c, load(from + c) * factor);
    if (c < depth) store(row + c, load_part(from + c, static_cast<int>(depth - c)) * factor);
  }
}

}  // namespace

void mla_pack_panel(const MlaParams& p, const MlaKeys& keys, int64_t head, int64_t panel) {
  const int64_t depth = p.nope + p.rope;
  const int64_t row = panel * kMlaPanelKeys;
  const int64_t rows = least(kMlaPanelKeys, keys.end - keys.begin - row);
  float* to = keys.panels + (head * keys.capacity + row) * depth;
  transpose_rows(rows, p.nope, keys.keys + (head * keys.capacity + row) * p.nope, p.nope, to);
  const int64_t width = mla_padded(p.latent + p.rope);
  transpose_rows(rows, p.rope, keys.latents + row * width + p.latent, width, to + p.nope * kMlaPanelKeys);
}

void mla_expanded_block(const MlaParams& p, const MlaKeys& keys, const MlaQueries& t) {
  const int64_t depth = p.nope + p.rope;
  const int64_t q_stride = mla_padded(depth);
  const int64_t values = mla_padded(p.value);
  const int64_t count = t.q_end - t.q_begin;
  const int64_t past = t.sequence->past + t.q_begin;  // keys before the block's first query
  float* queries = t.scratch;
  float* scores = queries + kMlaQueryBlock * q_stride;
  gather_queries(p, t, queries);
  const int64_t out_stride = p.heads * p.value;
  float* out = p.out + ((t.sequence->first + t.q_begin) * p.heads + t.head) * p.value;
  if (keys.begin == 0) {
    for (int64_t r = 0; r < count; ++r) {
      t.top[r] = kMinusInfinity;
      t.sum[r] = 0;
      for (int64_t v = 0; v < p.value; ++v) out[r * out_stride + v] = 0;
    }
  }
  const int64_t end = least(keys.end, past + count);  // the last query sees keys up to its own
  for (int64_t j = keys.begin; j < end; j += kMlaKeyBlock) {
    const int64_t n = least(kMlaKeyBlock, end - j);
    const int64_t first = least(count, j > past ? j - past : 0);  // queries before it see none of these keys
    const int64_t row = j - keys.begin;
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
      const float* panel = keys.panels +
                           (t.head * keys.capacity + (row + i) / kMlaPanelKeys * kMlaPanelKeys) * depth +
                           (row + i) % kMlaPanelKeys;
      gemm_panel(count - first, 2 * kLanes, depth, queries + first * q_stride, q_stride, panel, kMlaPanelKeys,
                 scores + first * kMlaKeyBlock + i, kMlaKeyBlock, false);
    }
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t r = first; r < count; ++r) {
      const float correction = softmax_step(least(n, past + r + 1 - j), padded, 1.0f,
                                            scores + r * kMlaKeyBlock, t.top[r], t.sum[r]);
      if (correction != 1.0f) scale_row(p.value, correction, out + r * out_stride);
    }
    const float* v = keys.values + (t.head * keys.capacity + row) * values;
    for (int64_t c = 0; c < p.value; c += 2 * kLanes) {
      gemm_panel(count - first, static_cast<int>(least(2 * kLanes, p.value - c)), n,
                 scores + first * kMlaKeyBlock, kMlaKeyBlock, v + c, values, out + first * out_stride + c,
                 out_stride, true);
    }
  }
  if (keys.end < past + count) return;  // more keys to come
  for (int64_t r = 0; r < count; ++r) scale_row(p.value, 1.0f / t.sum[r], out + r * out_stride);
}

}  // namespace kilin::KILIN_ISA
