// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla/mla_isa.h"

#include "kernels/matmul/gemm_isa.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::KILIN_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
// Queries handled at once in the expanded order: 48 x 128 scores are 24 KB.
constexpr int64_t kQueryBlock = 48;

KILIN_INLINE int64_t pad(int64_t n) { return (n + kNr - 1) / kNr * kNr; }
KILIN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

KILIN_INLINE const float* cache_row(const MlaParams& p, const MlaSequence& s, int64_t j) {
  return s.pages[j / p.page_tokens] + j % p.page_tokens * p.page_stride;
}

KILIN_INLINE float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

KILIN_INLINE void scale_row(int64_t n, float factor, float* x) {
  const Vec f = splat(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * f);
  if (i < n) store_part(x + i, load_part(x + i, static_cast<int>(n - i)) * f, static_cast<int>(n - i));
}

// One step of the online softmax of a row: scores[0..n) become e^(score * scale - top), the rest of the row
// up to `width` becomes 0; `top` and `sum` move on. Returns the factor for what was summed before.
KILIN_INLINE float softmax_step(int64_t n, int64_t width, float scale, float* scores, float& top,
                                float& sum) {
  if (n <= 0) {  // the query lies before all of these keys
    for (int64_t i = 0; i < width; ++i) scores[i] = 0;
    return 1.0f;
  }
  for (int64_t i = n; i < width; ++i) scores[i] = kMinusInfinity;
  Vec best = splat(kMinusInfinity);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) best = max(best, load(scores + i));
  float highest = reduce_max(best);
  for (int64_t j = i; j < width; ++j) highest = scores[j] > highest ? scores[j] : highest;
  const float new_top = highest * scale > top ? highest * scale : top;
  const Vec shift = splat(new_top);
  const Vec factor = splat(scale);
  Vec total = zero();
  for (i = 0; i < width; i += kLanes) {
    const int part = width - i < kLanes ? static_cast<int>(width - i) : kLanes;
    Vec e = exp(load_part(scores + i, part) * factor - shift);
    if (part < kLanes) {  // lanes beyond the row held 0, not minus infinity
      float lanes[kLanes];
      store(lanes, e);
      e = load_part(lanes, part);
    }
    store_part(scores + i, e, part);
    total += e;
  }
  const float correction = exp_one(top - new_top);
  sum = sum * correction + reduce_add(total);
  top = new_top;
  return correction;
}

// C[m x n] += A[m x depth] B[depth x n], B readable over pad(n) columns
KILIN_INLINE void gemm_accumulate(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda,
                                  const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < n; j += kNr) {
    gemm_panel(m, static_cast<int>(least(kNr, n - j)), depth, a, lda, b + j, ldb, c + j, ldc, accumulate);
  }
}

}  // namespace

int64_t mla_padded(int64_t n) { return pad(n); }

void mla_absorb_query(const MlaParams& p, int64_t head, const float* q, float* q_absorbed, float* row) {
  for (int64_t i = 0; i < p.latent; ++i) q_absorbed[i] = 0;
  for (int64_t d = 0; d < p.nope; ++d) {
    widen(p.kv_b, head * (p.nope + p.value) + d, row);
    const Vec factor = splat(q[d]);
    int64_t i = 0;
    for (; i + kLanes <= p.latent; i += kLanes) {
      store(q_absorbed + i, load(q_absorbed + i) + factor * load(row + i));
    }
    for (; i < p.latent; ++i) q_absorbed[i] += q[d] * row[i];
  }
  for (int64_t i = 0; i < p.rope; ++i) q_absorbed[p.latent + i] = q[p.nope + i];
}

void mla_absorb_piece(const MlaParams& p, const MlaSequence& s, int64_t rows, const float* queries,
                      const int64_t* visible, int64_t begin, int64_t end, float* context, float* top,
                      float* sum, float* scores) {
  const int64_t width = p.latent + p.rope;
  const int64_t context_stride = pad(p.latent);
  for (int64_t r = 0; r < rows; ++r) {
    top[r] = kMinusInfinity;
    sum[r] = 0;
  }
  for (int64_t i = 0; i < rows * context_stride; ++i) context[i] = 0;
  for (int64_t j = begin; j < end; j += kMlaKeyBlock) {
    const int64_t keys = least(kMlaKeyBlock, end - j);
    const float* block = cache_row(p, s, j);
    MatmulJob job;
    job.tokens = rows;
    job.x = queries;
    job.x_stride = width;
    job.y = scores;
    job.y_stride = kMlaKeyBlock;
    job.w.data = block;
    job.w.dtype = Dtype::kF32;
    job.w.rows = keys;
    job.w.cols = width;
    matmul_rows(job, 0, keys);
    for (int64_t r = 0; r < rows; ++r) {
      const float correction =
          softmax_step(least(keys, visible[r] - j), keys, p.scale, scores + r * kMlaKeyBlock, top[r], sum[r]);
      if (correction != 1.0f) scale_row(context_stride, correction, context + r * context_stride);
    }
    gemm_accumulate(rows, p.latent, keys, scores, kMlaKeyBlock, block, p.page_stride, context, context_stride,
                    true);
  }
}

void mla_merge_value(const MlaParams& p, int64_t head, int64_t pieces, const float* context,
                     int64_t context_stride, const float* top, const float* sum, int64_t top_stride,
                     float* merged, float* out) {
  float best = kMinusInfinity;
  for (int64_t i = 0; i < pieces; ++i) best = top[i * top_stride] > best ? top[i * top_stride] : best;
  float total = 0;
  for (int64_t c = 0; c < p.latent; ++c) merged[c] = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const float factor = exp_one(top[i * top_stride] - best);
    total += sum[i * top_stride] * factor;
    for (int64_t c = 0; c < p.latent; ++c) merged[c] += factor * context[i * context_stride + c];
  }
  for (int64_t c = 0; c < p.latent; ++c) merged[c] /= total;
  MatmulJob job;
  job.tokens = 1;
  job.x = merged;
  job.x_stride = p.latent;
  job.w = p.kv_b;
  const int64_t first = head * (p.nope + p.value) + p.nope;
  job.w.data = static_cast<const char*>(p.kv_b.data) +
               first * p.latent * static_cast<int64_t>(dtype_size(p.kv_b.dtype));
  job.w.rows = p.value;
  job.y = out;
  job.y_stride = p.value;
  matmul_rows(job, 0, p.value);
}

namespace {

// What mla_expand_block keeps for one head: weights widened once, one block of keys and values, and the
// running sums.
struct ExpandScratch {
  float* w_key;    // [nope][latent]
  float* w_value;  // [latent][pad(value)]: W_UV transposed
  float* cache_t;  // [latent + rope][kMlaKeyBlock]: the block's cache rows transposed
  float* keys_t;   // [nope + rope][kMlaKeyBlock]
  float* values;   // [kMlaKeyBlock][pad(value)]
  float* scores;   // [kQueryBlock][kMlaKeyBlock]
  float* sums;     // [queries][pad(value)]
  float* top;      // [queries]
  float* total;    // [queries]
};

int64_t lay_out(const MlaParams& p, int64_t queries, float* base, ExpandScratch* s) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* at = base == nullptr ? nullptr : base + used;
    used += (floats + 15) / 16 * 16;
    return at;
  };
  s->w_key = take(p.nope * p.latent);
  s->w_value = take(p.latent * pad(p.value));
  s->cache_t = take((p.latent + p.rope) * kMlaKeyBlock);
  s->keys_t = take((p.nope + p.rope) * kMlaKeyBlock);
  s->values = take(kMlaKeyBlock * pad(p.value));
  s->scores = take(kQueryBlock * kMlaKeyBlock);
  s->sums = take(queries * pad(p.value));
  s->top = take(queries);
  s->total = take(queries);
  return used;
}

void widen_head(const MlaParams& p, int64_t head, const ExpandScratch& s) {
  const int64_t first = head * (p.nope + p.value);
  for (int64_t d = 0; d < p.nope; ++d) widen(p.kv_b, first + d, s.w_key + d * p.latent);
  const int64_t columns = pad(p.value);
  float* row = s.cache_t;  // free at this time, and at least [latent] long
  for (int64_t i = 0; i < p.latent * columns; ++i) s.w_value[i] = 0;
  for (int64_t v = 0; v < p.value; ++v) {
    widen(p.kv_b, first + p.nope + v, row);
    for (int64_t c = 0; c < p.latent; ++c) s.w_value[c * columns + v] = row[c];
  }
}

// Keys (transposed) and values of cache rows [j, j + keys).
void expand_keys(const MlaParams& p, const float* block, int64_t keys, const ExpandScratch& s) {
  const int64_t width = p.latent + p.rope;
  for (int64_t r = 0; r < keys; ++r) {
    for (int64_t c = 0; c < width; ++c) s.cache_t[c * kMlaKeyBlock + r] = block[r * p.page_stride + c];
  }
  gemm_accumulate(p.nope, keys, p.latent, s.w_key, p.latent, s.cache_t, kMlaKeyBlock, s.keys_t, kMlaKeyBlock,
                  false);
  std::memcpy(s.keys_t + p.nope * kMlaKeyBlock, s.cache_t + p.latent * kMlaKeyBlock,
              static_cast<size_t>(p.rope * kMlaKeyBlock) * sizeof(float));
  gemm_accumulate(keys, p.value, p.latent, block, p.page_stride, s.w_value, pad(p.value), s.values,
                  pad(p.value), false);
}

}  // namespace

int64_t mla_expand_floats(const MlaParams& p, int64_t queries) {
  ExpandScratch s;
  return lay_out(p, queries, nullptr, &s) + kNr;
}

void mla_expand_block(const MlaParams& p, const MlaSequence& seq, int64_t head, int64_t q_begin,
                      int64_t q_end, float* scratch) {
  ExpandScratch s;
  const int64_t floats = lay_out(p, q_end - q_begin, scratch, &s);
  for (int64_t i = 0; i < floats; ++i) scratch[i] = 0;
  widen_head(p, head, s);
  const int64_t columns = pad(p.value);
  const int64_t q_stride = p.heads * (p.nope + p.rope);
  for (int64_t r = 0; r < q_end - q_begin; ++r) s.top[r] = kMinusInfinity;
  const int64_t end = seq.past + q_end;  // keys that the last query sees
  for (int64_t j = 0; j < end; j += kMlaKeyBlock) {
    const int64_t keys = least(kMlaKeyBlock, end - j);
    expand_keys(p, cache_row(p, seq, j), keys, s);
    for (int64_t q = q_begin; q < q_end; q += kQueryBlock) {
      const int64_t rows = least(kQueryBlock, q_end - q);
      if (seq.past + q + rows <= j) continue;  // all of these queries lie before the block
      const float* queries = p.q + (seq.first + q) * q_stride + head * (p.nope + p.rope);
      gemm_accumulate(rows, keys, p.nope + p.rope, queries, q_stride, s.keys_t, kMlaKeyBlock, s.scores,
                      kMlaKeyBlock, false);
      float* sums = s.sums + (q - q_begin) * columns;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = seq.past + q + r + 1 - j;
        const int64_t at = q - q_begin + r;
        const float correction = softmax_step(least(keys, visible), keys, p.scale,
                                              s.scores + r * kMlaKeyBlock, s.top[at], s.total[at]);
        if (correction != 1.0f) scale_row(columns, correction, sums + r * columns);
      }
      gemm_accumulate(rows, p.value, keys, s.scores, kMlaKeyBlock, s.values, columns, sums, columns, true);
    }
  }
  for (int64_t q = q_begin; q < q_end; ++q) {
    float* out = p.out + (seq.first + q) * p.heads * p.value + head * p.value;
    const float inverse = 1.0f / s.total[q - q_begin];
    for (int64_t v = 0; v < p.value; ++v) out[v] = s.sums[(q - q_begin) * columns + v] * inverse;
  }
}

}  // namespace kilin::KILIN_ISA
