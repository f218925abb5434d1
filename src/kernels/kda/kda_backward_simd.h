// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda, compiled once per instruction set: what the gradients of a chunk need besides
// products with the state. Its operands, the pairs of tokens inside it, and the way back through norm, gate
// and sigmoid. The formulas are in kda_backward_isa.cc.
#pragma once
#include "kernels/kda/kda_backward_isa.h"
#include "kernels/kda/kda_chunk_simd.h"

namespace kilin::KILIN_ISA {

// Operands and results of one chunk, rows of tokens [C][padded] unless told otherwise. Rows behind the last
// token have zero keys and queries and a decay of 1.
struct BackwardChunk {
  int padded;
  float* k;
  float* q;
  float* decay;     // e^g
  float* slope;     // dg/dx of the raw gate x, without padding channels of meaning
  float* by_a_log;  // dg/dA_log
  float* x;         // [2 C][padded] k D, then q D
  float* kt;        // k D_C / D
  float* dx;        // [2 C][padded] gradients of k D, then of q D; later of k and q
  float* dkt;       // of kt; later of g
  float* columns;   // [3][padded][C] the same three gradients while they are summed, tokens in the lanes
  float* total;     // [padded] D_C
  float* d_total;   // [padded] sum over values of S (dS of the state after the chunk)
  float* beta;      // [C]
  float* d_beta;    // [C][kLanes] sums still spread over lanes
  float* lower;     // [C][C] -L
  float* pt;        // [C][C] P^T
  float* dp;        // [2 C][C] dP, then -dL; upper triangles are of no meaning
};

// Carves arrays of floats out of one piece of memory, with a cache line between them: arrays of 8 KB that
// begin at the same place of a page would compete for the same few sets of the first-level cache.
struct Carver {
  float* next;
  float* take(int64_t count) {
    float* from = next;
    next += (count + 15) / 16 * 16 + 16;
    return from;
  }
};

static inline BackwardChunk make_backward_chunk(Carver& memory, int padded) {
  BackwardChunk c{};
  const int64_t rows = static_cast<int64_t>(kC) * padded;
  c.padded = padded;
  c.k = memory.take(rows);
  c.q = memory.take(rows);
  c.decay = memory.take(rows);
  c.slope = memory.take(rows);
  c.by_a_log = memory.take(rows);
  c.x = memory.take(2 * rows);
  c.kt = memory.take(rows);
  c.dx = memory.take(2 * rows);
  c.dkt = memory.take(rows);
  c.columns = memory.take(3 * rows);
  c.total = memory.take(padded);
  c.d_total = memory.take(padded);
  c.beta = memory.take(kC);
  c.d_beta = memory.take(kC * kLanes);
  c.lower = memory.take(kC * kC);
  c.pt = memory.take(kC * kC);
  c.dp = memory.take(2 * kC * kC);
  return c;
}

// Of raw gate values x (bias already added): x <- e^g, and dg/dx and dg/dA_log.
template <int N>
KILIN_INLINE void gate_slope(Vec (&x)[N], KdaGate kind, Vec rate, float lower_bound, Vec (&slope)[N],
                             Vec (&by_a_log)[N]) {
  const Vec one = splat(1.0f);
  if (kind == KdaGate::kNone) {
    for (int i = 0; i < N; ++i) x[i] = exp(x[i]);
    for (int i = 0; i < N; ++i) slope[i] = one;
    for (int i = 0; i < N; ++i) by_a_log[i] = zero();
    return;
  }
  const Vec factor = kind == KdaGate::kSoftplus ? one : rate;
  Vec y[N];
  Vec inverse[N];
  Vec sigmoid[N];
  for (int i = 0; i < N; ++i) y[i] = -max(factor * x[i], -factor * x[i]);
  exp_decay(y);
  for (int i = 0; i < N; ++i) inverse[i] = one / (one + y[i]);
  for (int i = 0; i < N; ++i) sigmoid[i] = x[i] < zero() ? y[i] * inverse[i] : inverse[i];
  if (kind == KdaGate::kSoftplus) {
    Vec log1p[N];
    log1p_interpolant(y, log1p);
    for (int i = 0; i < N; ++i) x[i] = -rate * (max(x[i], zero()) + log1p[i]);
    for (int i = 0; i < N; ++i) slope[i] = -rate * sigmoid[i];
    for (int i = 0; i < N; ++i) by_a_log[i] = x[i];
  } else {
    const Vec bound = splat(lower_bound);
    for (int i = 0; i < N; ++i) slope[i] = bound * y[i] * inverse[i] * inverse[i] * rate;
    for (int i = 0; i < N; ++i) by_a_log[i] = slope[i] * x[i];
    for (int i = 0; i < N; ++i) x[i] = bound * sigmoid[i];
  }
  exp_decay(x);
}

template <int N>
KILIN_INLINE void prepare_slopes(const KdaParams& p, const Head& head, const float* raw, int d,
                                 const BackwardChunk& c, int64_t at) {
  Vec x[N];
  Vec slope[N];
  Vec by_a_log[N];
  for (int i = 0; i < N; ++i) x[i] = p.scalar_gate ? splat(raw[0]) : load_row(raw, d + i * kLanes, p.key_dim);
  if (head.bias != nullptr) {
    for (int i = 0; i < N; ++i)
      x[i] += p.scalar_gate ? splat(head.bias[0]) : load_row(head.bias, d + i * kLanes, p.key_dim);
  }
  gate_slope(x, p.gate_kind, head.rate, p.lower_bound, slope, by_a_log);
  for (int i = 0; i < N; ++i) store(c.decay + at + i * kLanes, x[i]);
  for (int i = 0; i < N; ++i) store(c.slope + at + i * kLanes, slope[i]);
  for (int i = 0; i < N; ++i) store(c.by_a_log + at + i * kLanes, by_a_log[i]);
}

KILIN_INLINE void prepare_gate(const KdaParams& p, const Head& head, int64_t token, int i,
                               const BackwardChunk& c) {
  const float* raw = head.gate + token * p.gate_stride;
  int d = 0;
  for (; d + 4 * kLanes <= c.padded; d += 4 * kLanes) prepare_slopes<4>(p, head, raw, d, c, i * c.padded + d);
  for (; d < c.padded; d += kLanes) prepare_slopes<1>(p, head, raw, d, c, i * c.padded + d);
}

// All operands of the n tokens from `token` on but L and P.
static inline void prepare_chunk(const KdaParams& p, const Head& head, int64_t token, int n,
                                 const BackwardChunk& c) {
  for (int i = 0; i < n; ++i) {
    prepare_keys(p, head, token + i, c.q + i * c.padded, c.k + i * c.padded);
    prepare_gate(p, head, token + i, i, c);
    c.beta[i] = prepare_beta(p, head.value_head, token + i);
  }
  for (int i = n; i < kC; ++i) {
    c.beta[i] = 0.0f;
    for (int d = 0; d < c.padded; d += kLanes) {
      store(c.q + i * c.padded + d, zero());
      store(c.k + i * c.padded + d, zero());
      store(c.decay + i * c.padded + d, splat(1.0f));
    }
  }
  for (int d = 0; d < c.padded; d += kLanes) {
    Vec total = splat(1.0f);
    for (int i = 0; i < kC; ++i) {
      const int at = i * c.padded + d;
      total *= load(c.decay + at);
      store(c.x + at, load(c.k + at) * total);
      store(c.x + kC * c.padded + at, load(c.q + at) * total);
    }
    store(c.total + d, total);
    Vec rest = splat(1.0f);
    for (int i = kC - 1; i >= 0; --i) {
      const int at = i * c.padded + d;
      store(c.kt + at, load(c.k + at) * rest);
      rest *= load(c.decay + at);
    }
  }
}

// One vector of channels of the pairs, j <= i, in the order of the tokens: the keys are decayed to each row i
// as in the forward pass,
//     dq_i = D_i d(q D)_i + sum_j dP_ij k_j D_i/D_j      dk_i = D_i d(k D)_i + beta_i sum_j dL_ij k_j D_i/D_j
// Returns sum_j kt_j dkt_j.
KILIN_INLINE Vec pairs_forward(const BackwardChunk& c, int d) {
  Vec key[kC];
  Vec total = splat(1.0f);
#pragma GCC unroll 16
  for (int i = 0; i < kC; ++i) {
    const int at = i * c.padded + d;
    const Vec decay = load(c.decay + at);
    const float* dp = c.dp + i * kC;
    const float* dl = dp + kC * kC;
    key[i] = load(c.k + at);
    Vec by_p[2] = {splat(dp[i]) * key[i], zero()};
    Vec by_l[2] = {};
#pragma GCC unroll 16
    for (int j = 0; j < i; ++j) {
      key[j] *= decay;
      by_p[j % 2] += splat(dp[j]) * key[j];
      by_l[j % 2] += splat(dl[j]) * key[j];
    }
    total *= decay;
    const Vec through_l = -(by_l[0] + by_l[1]);
    store(c.d_beta + i * kLanes, load(c.d_beta + i * kLanes) + through_l * key[i]);
    store(c.dx + at, load(c.dx + at) * total + splat(c.beta[i]) * through_l);
    float* dq = c.dx + kC * c.padded + at;
    store(dq, load(dq) * total + (by_p[0] + by_p[1]));
  }
  Vec sum = zero();
#pragma GCC unroll 16
  for (int j = 0; j < kC; ++j) sum += key[j] * load(c.dkt + j * c.padded + d);
  return sum;
}

// The same pairs backwards: key j receives from all later rows
//     c_j = D_C/D_j dkt_j + sum_i D_i/D_j (dP_ij q_i + beta_i dL_ij k_i)
// by Horner's rule, so that again only decays are multiplied. Then dk_j += c_j, and the gradient of the
// decay's logarithm is the sum over all later tokens of q dq + k (dk - 2 c), where `last` belongs to the end
// of the chunk. Behind a decay of zero that sum is zero: rounding errors must not pass, because gates may
// multiply them by thousands.
KILIN_INLINE void pairs_backward(const BackwardChunk& c, int d, Vec last) {
  Vec later[kC];
#pragma GCC unroll 16
  for (int j = 0; j < kC; ++j) later[j] = load(c.dkt + j * c.padded + d);
  Vec sum = last;
  Vec decay = splat(1.0f);
#pragma GCC unroll 16
  for (int i = kC - 1; i >= 0; --i) {
    const int at = i * c.padded + d;
    const float* dp = c.dp + i * kC;
    const float* dl = dp + kC * kC;
    const Vec k = load(c.k + at);
    const Vec q = load(c.q + at);
    const Vec row_k = k * splat(-c.beta[i]);
#pragma GCC unroll 16
    for (int j = 0; j < i; ++j) later[j] = later[j] * decay + splat(dp[j]) * q + splat(dl[j]) * row_k;
    later[i] = later[i] * decay + splat(dp[i]) * q;
    const Vec dk = load(c.dx + at);
    const Vec dq = load(c.dx + kC * c.padded + at);
    decay = load(c.decay + at);
    sum += q * dq + k * (dk - later[i]);
    sum = decay == zero() ? zero() : sum;
    store(c.dx + at, dk + later[i]);
    store(c.dkt + at, sum);
  }
}

// Gradients of the raw row x from dy of y = factor x / sqrt(sum x^2 + 1e-6), or y = factor x: writes them or
// adds them.
KILIN_INLINE void finish_keys(const KdaParams& p, const float* raw, const float* dy, float factor, bool add,
                              float* to) {
  Vec xx = zero();
  Vec xd = zero();
  const int padded = (p.key_dim + kLanes - 1) / kLanes * kLanes;
  for (int d = 0; d < padded; d += kLanes) {
    const Vec x = load_row(raw, d, p.key_dim);
    xx += x * x;
    xd += x * load_row(dy, d, p.key_dim);  // beyond the channels there may be anything
  }
  float along = 0.0f;
  if (p.l2norm) {
    const Vec4 sums = reduce4(xx, xd, xd, xd);
    const float square = 1.0f / (sums[0] + 1e-6f);
    factor *= __builtin_sqrtf(square);
    along = sums[1] * square;
  }
  for (int d = 0; d < padded; d += kLanes) {
    Vec dx = splat(factor) * (load(dy + d) - splat(along) * load_row(raw, d, p.key_dim));
    if (add) dx += load_row(to, d, p.key_dim);
    store_row(to, d, p.key_dim, dx);
  }
}

// Gradient of a token's raw gate from that of g, added up for a_log (a vector) and dt_bias as well.
KILIN_INLINE void finish_gate(const KdaParams& p, const BackwardChunk& c, int i, float* to, Vec& a_log,
                              float* bias) {
  Vec scalar = zero();
  for (int d = 0; d < c.padded; d += kLanes) {
    const int at = i * c.padded + d;
    // Beyond the head's channels there may be anything: what an earlier call left in the scratch.
    const Vec dg = load_row(c.dkt + i * c.padded, d, p.key_dim);
    const Vec dx = dg * load(c.slope + at);
    // where e^g is 0, g may be so large that 0 g is no number
    a_log += load(c.decay + at) == zero() ? zero() : dg * load(c.by_a_log + at);
    scalar += dx;
    if (p.scalar_gate) continue;
    store(bias + d, load(bias + d) + dx);
    if (to != nullptr) store_row(to, d, p.key_dim, dx);
  }
  if (!p.scalar_gate) return;
  const float sum = reduce_add(scalar);
  bias[0] += sum;
  if (to != nullptr) to[0] = sum;
}

}  // namespace kilin::KILIN_ISA
