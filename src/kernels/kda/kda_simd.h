// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda, compiled once per instruction set: sums across lanes, a 4 x 4 transposition, and
// what happens to one token's q, k and gate before the recurrence.
#pragma once
#include "kernels/cpu/vec.h"
#include "kernels/kda/kda.h"

namespace kilin::KILIN_ISA {

typedef float Vec4 __attribute__((vector_size(16)));

#if defined(__AVX512F__)
typedef float Vec8 __attribute__((vector_size(32)));
#define KILIN_KDA_SHUFFLE(a, b, i0, i1, i2, i3)                                                    \
  __builtin_shufflevector(                                                                         \
      a, b, (i0) % 4 + (i0) / 4 * 16, (i1) % 4 + (i1) / 4 * 16, (i2) % 4 + (i2) / 4 * 16,          \
      (i3) % 4 + (i3) / 4 * 16, (i0) % 4 + (i0) / 4 * 16 + 4, (i1) % 4 + (i1) / 4 * 16 + 4,        \
      (i2) % 4 + (i2) / 4 * 16 + 4, (i3) % 4 + (i3) / 4 * 16 + 4, (i0) % 4 + (i0) / 4 * 16 + 8,    \
      (i1) % 4 + (i1) / 4 * 16 + 8, (i2) % 4 + (i2) / 4 * 16 + 8, (i3) % 4 + (i3) / 4 * 16 + 8,    \
      (i0) % 4 + (i0) / 4 * 16 + 12, (i1) % 4 + (i1) / 4 * 16 + 12, (i2) % 4 + (i2) / 4 * 16 + 12, \
      (i3) % 4 + (i3) / 4 * 16 + 12)
KILIN_INLINE Vec4 fold(Vec v) {
  const Vec8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
#elif defined(__AVX2__)
#define KILIN_KDA_SHUFFLE(a, b, i0, i1, i2, i3)                                                              \
  __builtin_shufflevector(a, b, (i0) % 4 + (i0) / 4 * 8, (i1) % 4 + (i1) / 4 * 8, (i2) % 4 + (i2) / 4 * 8,   \
                          (i3) % 4 + (i3) / 4 * 8, (i0) % 4 + (i0) / 4 * 8 + 4, (i1) % 4 + (i1) / 4 * 8 + 4, \
                          (i2) % 4 + (i2) / 4 * 8 + 4, (i3) % 4 + (i3) / 4 * 8 + 4)
KILIN_INLINE Vec4 fold(Vec v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#else
#define KILIN_KDA_SHUFFLE(a, b, i0, i1, i2, i3) __builtin_shufflevector(a, b, i0, i1, i2, i3)
KILIN_INLINE Vec4 fold(Vec v) { return v; }
#endif

// The sums over all lanes of a, b, c and d: the same order of additions for each of the four. The shuffles
// stay within 128-bit lanes (numbered 0 to 3 of the first operand, 4 to 7 of the second).
KILIN_INLINE Vec4 reduce4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = KILIN_KDA_SHUFFLE(a, b, 0, 4, 1, 5) + KILIN_KDA_SHUFFLE(a, b, 2, 6, 3, 7);
  const Vec cd = KILIN_KDA_SHUFFLE(c, d, 0, 4, 1, 5) + KILIN_KDA_SHUFFLE(c, d, 2, 6, 3, 7);
  return fold(KILIN_KDA_SHUFFLE(ab, cd, 0, 1, 4, 5) + KILIN_KDA_SHUFFLE(ab, cd, 2, 3, 6, 7));
}
#undef KILIN_KDA_SHUFFLE

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 4
KILIN_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec4 row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], from + i * from_stride, sizeof(Vec4));
  const Vec4 low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Vec4 high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Vec4 low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Vec4 high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Vec4 column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) std::memcpy(to + j * to_stride, &column[j], sizeof(Vec4));
}

// Lanes from a row of n floats at position c; lanes behind its end are zero.
KILIN_INLINE Vec load_row(const float* row, int c, int n) {
  if (c + kLanes <= n) return load(row + c);
  return c < n ? load_part(row + c, n - c) : zero();
}

// The lanes of v that a row of n floats has at position c.
KILIN_INLINE void store_row(float* row, int c, int n, Vec v) {
  if (c + kLanes <= n) {
    store(row + c, v);
  } else if (c < n) {
    store_part(row + c, v, n - c);
  }
}

// The gate is a chain of some 50 dependent operations: a processor overlaps too few of them on its own, so
// they are written for N independent vectors side by side.
template <int N>
KILIN_INLINE void multiply_add(Vec (&p)[N], const Vec (&x)[N], float constant) {
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat(constant);
}

// x <- e^x for x <= 0 (up to 88) within 2 ulp, 0 below -87.3; NaN stays NaN. As exp() of vec.h without its
// upper range.
template <int N>
KILIN_INLINE void exp_decay(Vec (&x)[N]) {
  const Vec lowest = splat(-87.33654f);
  const Vec magic = splat(12582912.0f);
  Vec shifted[N];
  Vec r[N];
  Vec p[N];
  for (int i = 0; i < N; ++i) r[i] = x[i] < lowest ? lowest : x[i];
  for (int i = 0; i < N; ++i) shifted[i] = r[i] * splat(1.44269504f) + magic;
  for (int i = 0; i < N; ++i) r[i] = r[i] - (shifted[i] - magic) * splat(0.693359375f);
  for (int i = 0; i < N; ++i) r[i] = r[i] - (shifted[i] - magic) * splat(-2.12194440e-4f);
  for (int i = 0; i < N; ++i) p[i] = splat(1.9875691500e-4f);
  multiply_add(p, r, 1.3981999507e-3f);
  multiply_add(p, r, 8.3334519073e-3f);
  multiply_add(p, r, 4.1665795894e-2f);
  multiply_add(p, r, 1.6666665459e-1f);
  multiply_add(p, r, 5.0000001201e-1f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * (r[i] * r[i]) + (r[i] + splat(1.0f));
  for (int i = 0; i < N; ++i) {
    // the low bits of `shifted` are n: moved up by 23 they are the exponent of 2^n, but for the bias
    const Vec power = reinterpret_cast<Vec>((reinterpret_cast<VecInt>(shifted[i]) << 23) + (127 << 23));
    x[i] = x[i] < lowest ? zero() : p[i] * power;
  }
}

// ln(1 + y) for y in [0, 1]: ln(1 + y) / y is a Chebyshev interpolant of degree 8 (relative error 3e-8, with
// rounding 1.7e-7), so that no division is needed.
template <int N>
KILIN_INLINE void log1p_interpolant(const Vec (&y)[N], Vec (&result)[N]) {
  Vec p[N];
  for (int i = 0; i < N; ++i) p[i] = splat(0.00525345793f);
  multiply_add(p, y, -0.0295885075f);
  multiply_add(p, y, 0.0783616677f);
  multiply_add(p, y, -0.136747703f);
  multiply_add(p, y, 0.191114306f);
  multiply_add(p, y, -0.248443693f);
  multiply_add(p, y, 0.333192706f);
  multiply_add(p, y, -0.499995023f);
  multiply_add(p, y, 1.0f);
  for (int i = 0; i < N; ++i) result[i] = p[i] * y[i];
}

// x <- ln(1 + e^x) = max(x, 0) + ln(1 + y) with y = e^-|x| in [0, 1]. Above 20 the result is x.
template <int N>
KILIN_INLINE void softplus_decay(Vec (&x)[N]) {
  Vec y[N];
  Vec p[N];
  for (int i = 0; i < N; ++i) y[i] = -max(x[i], -x[i]);
  exp_decay(y);
  log1p_interpolant(y, p);
  for (int i = 0; i < N; ++i) x[i] = max(x[i], zero()) + p[i];
}

// x <- e^g of raw gate values x (bias already added) for rate = e^A_log
template <int N>
KILIN_INLINE void gate_decay(Vec (&x)[N], KdaGate kind, Vec rate, float lower_bound) {
  if (kind == KdaGate::kNone) {
    for (int i = 0; i < N; ++i) x[i] = exp(x[i]);
    return;
  }
  if (kind == KdaGate::kSoftplus) {
    softplus_decay(x);
    for (int i = 0; i < N; ++i) x[i] = -rate * x[i];
  } else {
    for (int i = 0; i < N; ++i) x[i] = splat(lower_bound) * sigmoid(rate * x[i]);
  }
  exp_decay(x);
}

// What stays the same for all tokens of one value head.
struct Head {
  const float* q;
  const float* k;
  const float* gate;
  const float* bias;  // null: zeros
  Vec rate;
  int value_head;
  int padded;  // K rounded up to 16
};

KILIN_INLINE Head make_head(const KdaParams& p, int value_head) {
  const int head = value_head / (p.value_heads / p.heads);
  const int64_t channels = p.scalar_gate ? 1 : p.key_dim;
  const bool raw = p.gate_kind == KdaGate::kNone;
  const bool use_bias = !raw && p.dt_bias != nullptr;
  const bool use_rate = !raw && p.a_log != nullptr;
  return Head{p.q + static_cast<int64_t>(head) * p.key_dim,
              p.k + static_cast<int64_t>(head) * p.key_dim,
              p.gate + value_head * channels,
              use_bias ? p.dt_bias + value_head * channels : nullptr,
              use_rate ? exp(splat(p.a_log[value_head])) : splat(1.0f),
              value_head,
              (p.key_dim + 15) / 16 * 16};
}

// The rows of one head lie a whole token apart (4 KB for 8 heads of 128), which no hardware prefetcher
// follows and which all fall into the same few first-level sets: the second-level cache is asked for them
// ahead of time.
KILIN_INLINE void prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

KILIN_INLINE void prefetch_keys(const KdaParams& p, const Head& head, int64_t token) {
  prefetch(head.q + token * p.q_stride, p.key_dim);
  prefetch(head.k + token * p.k_stride, p.key_dim);
  prefetch(head.gate + token * p.gate_stride, p.scalar_gate ? 1 : p.key_dim);
}

KILIN_INLINE void prefetch_row(const KdaParams& p, const Head& head, int value_begin, int value_end,
                               int64_t token) {
  const int64_t column = static_cast<int64_t>(head.value_head) * p.value_dim + value_begin;
  prefetch_keys(p, head, token);
  prefetch(p.v + token * p.v_stride + column, value_end - value_begin);
  prefetch(p.out + token * p.out_stride + column, value_end - value_begin);
}

// decay[c, c + N kLanes) = e^g; lanes behind the end of the row get some value in [0, 1] (their keys are
// zero)
template <int N>
KILIN_INLINE void prepare_decays(const KdaParams& p, const Head& head, const float* x, int c, float* decay) {
  Vec biased[N];
  for (int i = 0; i < N; ++i) biased[i] = load_row(x, c + i * kLanes, p.key_dim);
  if (head.bias != nullptr) {
    for (int i = 0; i < N; ++i) biased[i] += load_row(head.bias, c + i * kLanes, p.key_dim);
  }
  gate_decay(biased, p.gate_kind, head.rate, p.lower_bound);
  for (int i = 0; i < N; ++i) store(decay + c + i * kLanes, biased[i]);
}

// decay[0, padded) = e^g of this token
KILIN_INLINE void prepare_decay(const KdaParams& p, const Head& head, int64_t token, float* decay) {
  const float* x = head.gate + token * p.gate_stride;
  int c = 0;
  if (p.scalar_gate) {
    Vec factor[1] = {splat(head.bias != nullptr ? x[0] + head.bias[0] : x[0])};
    gate_decay(factor, p.gate_kind, head.rate, p.lower_bound);
    for (; c < head.padded; c += kLanes) store(decay + c, factor[0]);
    return;
  }
  for (; c + 4 * kLanes <= head.padded; c += 4 * kLanes) prepare_decays<4>(p, head, x, c, decay);
  for (; c < head.padded; c += kLanes) prepare_decays<1>(p, head, x, c, decay);
}

KILIN_INLINE float prepare_beta(const KdaParams& p, int value_head, int64_t token) {
  const float beta = p.beta[token * p.beta_stride + value_head];
  return p.beta_is_logit ? sigmoid(splat(beta))[0] : beta;
}

// q[0, padded) and k[0, padded) of this token, normalised when asked for, q times scale; padding channels are
// zero. Returns q . k.
KILIN_INLINE float prepare_keys(const KdaParams& p, const Head& head, int64_t token, float* q, float* k) {
  const float* raw_q = head.q + token * p.q_stride;
  const float* raw_k = head.k + token * p.k_stride;
  Vec qq = zero();
  Vec kk = zero();
  Vec qk = zero();
  for (int c = 0; c < head.padded; c += kLanes) {
    const Vec vq = load_row(raw_q, c, p.key_dim);
    const Vec vk = load_row(raw_k, c, p.key_dim);
    qq += vq * vq;
    kk += vk * vk;
    qk += vq * vk;
  }
  const Vec4 sums = reduce4(qq, kk, qk, qk);
  float q_factor = p.scale;
  float k_factor = 1.0f;
  if (p.l2norm) {
    q_factor /= __builtin_sqrtf(sums[0] + 1e-6f);
    k_factor /= __builtin_sqrtf(sums[1] + 1e-6f);
  }
  for (int c = 0; c < head.padded; c += kLanes) {
    store(q + c, load_row(raw_q, c, p.key_dim) * splat(q_factor));
    store(k + c, load_row(raw_k, c, p.key_dim) * splat(k_factor));
  }
  return sums[2] * q_factor * k_factor;
}

}  // namespace kilin::KILIN_ISA
