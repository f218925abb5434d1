// SPDX-License-Identifier: Apache-2.0
// The recurrence of kda.h token by token, one pass over the state per token. The decay and the update are
// folded into
//     a = S (k * e^g),  b = S (q * e^g)          two dot products per row of the undecayed state
//     d = beta (v - a),  o = b + d (k . q)       (S e^g + d k^T) q = S (q e^g) + d (k . q)
//     S <- S * e^g + d k^T
// so that a block of four rows (2 KB for K = 128) is read from memory once, stays in the first-level cache,
// and each element costs two fused multiply-adds, one multiplication and one more multiply-add.
#include "kernels/kda/kda_isa.h"
#include "kernels/kda/kda_simd.h"

namespace kilin::KILIN_ISA {
namespace {

// One token's operands, [padded] each.
struct Token {
  float* k;
  float* decay;
  float* decayed_k;
  float* decayed_q;
  float k_dot_q;
  float beta;
};

KILIN_INLINE void prepare_token(const KdaParams& p, const Head& head, int64_t token, float* q, Token& to) {
  to.k_dot_q = prepare_keys(p, head, token, q, to.k);
  prepare_decay(p, head, token, to.decay);
  to.beta = prepare_beta(p, head.value_head, token);
  for (int c = 0; c < head.padded; c += kLanes) {
    const Vec decay = load(to.decay + c);
    store(to.decayed_k + c, load(to.k + c) * decay);
    store(to.decayed_q + c, load(q + c) * decay);
  }
}

// kRows (1 or 4) rows of the state, each of n channels: updates them and writes out[0, kRows).
template <int kRows>
KILIN_INLINE void step_rows(const Token& token, int n, const float* v, float* state, float* out) {
  Vec recalled[4] = {};
  Vec read[4] = {};
  const int full = n / kLanes * kLanes;
  for (int c = 0; c < full; c += kLanes) {
    const Vec key = load(token.decayed_k + c);
    const Vec query = load(token.decayed_q + c);
    for (int r = 0; r < kRows; ++r) {
      const Vec s = load(state + r * static_cast<int64_t>(n) + c);
      recalled[r] += s * key;
      read[r] += s * query;
    }
  }
  if (full < n) {
    for (int r = 0; r < kRows; ++r) {
      const Vec s = load_part(state + r * static_cast<int64_t>(n) + full, n - full);
      recalled[r] += s * load(token.decayed_k + full);
      read[r] += s * load(token.decayed_q + full);
    }
  }
  const Vec4 recall = reduce4(recalled[0], recalled[1], recalled[2], recalled[3]);
  const Vec4 answer = reduce4(read[0], read[1], read[2], read[3]);
  Vec delta[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float d = token.beta * (v[r] - recall[r]);
    out[r] = answer[r] + d * token.k_dot_q;
    delta[r] = splat(d);
  }
  for (int c = 0; c < full; c += kLanes) {
    const Vec key = load(token.k + c);
    const Vec decay = load(token.decay + c);
    for (int r = 0; r < kRows; ++r) {
      float* s = state + r * static_cast<int64_t>(n) + c;
      store(s, load(s) * decay + delta[r] * key);
    }
  }
  if (full < n) {
    for (int r = 0; r < kRows; ++r) {
      float* s = state + r * static_cast<int64_t>(n) + full;
      const Vec old = load_part(s, n - full);
      store_part(s, old * load(token.decay + full) + delta[r] * load(token.k + full), n - full);
    }
  }
}

void step_head(const KdaParams& p, const KdaTask& task, int value_head, float* scratch) {
  const Head head = make_head(p, value_head);
  const int n = p.key_dim;
  float* q = scratch;
  Token token{q + head.padded, q + 2 * head.padded, q + 3 * head.padded, q + 4 * head.padded, 0.0f, 0.0f};
  const int64_t column = static_cast<int64_t>(value_head) * p.value_dim;
  float* state = p.state + p.slots[task.sequence] * p.slot_stride + column * n;
  const int64_t end = p.cu_seqlens[task.sequence + 1];
  const int64_t begin = p.cu_seqlens[task.sequence];
  const int ahead = (1023 + n) / n;  // rows: 4 KB, because the hardware prefetcher stops at the end of a page
  for (int64_t t = begin; t < end; ++t) {
    if (t + 1 < end) prefetch_row(p, head, task.value_begin, task.value_end, t + 1);
    const bool cold = t == begin;  // later tokens find the state in the second-level cache
    prepare_token(p, head, t, q, token);
    const float* v = p.v + t * p.v_stride + column;
    float* out = p.out + t * p.out_stride + column;
    int row = task.value_begin;
    for (; row + 4 <= task.value_end; row += 4) {
      if (cold && row + ahead + 4 <= task.value_end)
        prefetch(state + static_cast<int64_t>(row + ahead) * n, 4 * n);
      step_rows<4>(token, n, v + row, state + static_cast<int64_t>(row) * n, out + row);
    }
    for (; row < task.value_end; ++row) {
      step_rows<1>(token, n, v + row, state + static_cast<int64_t>(row) * n, out + row);
    }
  }
}

}  // namespace

void kda_recurrent_task(const KdaParams& p, const KdaTask& task, float* scratch) {
  for (int g = 0; g < task.head_count; ++g) step_head(p, task, task.value_head + g, scratch);
}

}  // namespace kilin::KILIN_ISA
