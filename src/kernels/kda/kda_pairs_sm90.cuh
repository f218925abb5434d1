// SPDX-License-Identifier: Apache-2.0
// Norms and decays of 16 tokens, and what 16 channels add to the products of pairs of them, in the registers
// of one warp: a chunk of the chunk kernels (kda_image_sm90.cuh), a sub-chunk of the gradient kernels
// (kda_backward_decays_sm90.cuh).
//
// Decays are split so that no operand overflows and nothing that matters underflows, for any gate. A decay
// below 2^-24 per token counts as 2^-24 (the resolution of fp32). When a chunk decays by no more than 2^-104,
// rows are taken times 2^G and columns times 2^-G (gentle); by no more than 2^-216, times 2^(G + 108) and
// 2^-(G + 108), which uses both halves of the range of exponents (shifted). Otherwise columns are taken
// relative to the fifth token of their half (8 tokens) and the rows relative to the one of the columns they
// meet: exponents are at most 96 where i >= j, since one token changes G by no more than 24 (steep). Operands
// are bf16, which has the range. What overflows above the diagonal is not looked at.
#pragma once
#include <type_traits>

#include "kernels/cuda/ptx.cuh"

namespace kilin::cuda {

// g and t: lane / 4 and lane % 4. Element: of q and k; Out: of the operands that a step gives.
template <class Element, class Out = Element>
struct ChunkPairs {
  // The squares of the rows of an A operand, added to the diagonal blocks of its product with its transpose.
  __device__ __forceinline__ static void add_squares(float (&upper)[4], float (&lower)[4],
                                                     const uint32_t (&x)[4]) {
    mma<Element>(upper, x, x[0], x[2]);
    mma<Element>(lower, x, x[1], x[3]);
  }
  // Of rows g and g + 8: 1 / norm, from the diagonals.
  __device__ __forceinline__ static void inverse_norms(int lane, const float (&upper)[4],
                                                       const float (&lower)[4], float (&norm)[2]) {
    const int g = lane >> 2, holder = (lane & ~3) | (g >> 1);
    norm[0] = rsqrtf(__shfl_sync(~0u, (g & 1) != 0 ? upper[1] : upper[0], holder) + 1e-6f);
    norm[1] = rsqrtf(__shfl_sync(~0u, (g & 1) != 0 ? lower[3] : lower[2], holder) + 1e-6f);
  }

  // Rows that sum over the tokens up to their own, as an A operand.
  __device__ __forceinline__ static void triangle(int g, int t, uint32_t (&ones)[4]) {
    ones[0] = pack<__nv_bfloat16>(2 * t <= g ? 1.0f : 0.0f, 2 * t + 1 <= g ? 1.0f : 0.0f);
    ones[1] = pack<__nv_bfloat16>(1.0f, 1.0f);
    ones[2] = 0;
    ones[3] = ones[0];
  }

  // sum[n] (accumulator layout, 16 tokens x 8 channels) = inclusive sum over tokens of x: a product with a
  // triangle of ones, each float as two bf16 terms (together 17 bits).
  __device__ __forceinline__ static void cumulative(const uint32_t (&ones)[4], const float (&x)[2][2][2],
                                                    float (&sum)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t first = __float_as_uint(x[n][h][0]), second = __float_as_uint(x[n][h][1]);
        high[h] = __byte_perm(first, second, 0x7632);
        low[h] = pack<__nv_bfloat16>(x[n][h][0] - __uint_as_float(first & 0xFFFF0000u),
                                     x[n][h][1] - __uint_as_float(second & 0xFFFF0000u));
      }
      sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
      mma<__nv_bfloat16>(sum[n], ones, low[0], low[1]);
      mma<__nv_bfloat16>(sum[n], ones, high[0], high[1]);
    }
  }

  // What a step gives, beside what is added to L and P: A operands of k 2^G, scale q 2^G, k 2^(G_C - G).
  struct Operands {
    uint32_t k[4], q[4], keys[4];
  };

  // Factors of the rows of this thread, g and g + 8.
  struct Factors {
    float k[2], q[2];
  };

  // An A operand as floats, its rows times factors.
  __device__ __forceinline__ static void scaled(const uint32_t (&r)[4], const float (&factor)[2],
                                                float (&x)[4][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<Element>(r[i]);
      x[i][0] = pair.x * factor[i & 1];
      x[i][1] = pair.y * factor[i & 1];
    }
  }

  template <bool kShifted>
  __device__ __forceinline__ static void gentle(int t, const float (&sum)[2][4], const uint32_t (&kr)[4],
                                                const uint32_t (&qr)[4], const Factors& factors,
                                                float (&decay)[4], Operands& o, float (&l)[2][4],
                                                float (&p)[2][4]) {
    constexpr float kShift = 108.0f, kBack = 0x1p-108f;
    float k[4][2], q[4][2];
    scaled(kr, factors.k, k);
    scaled(qr, factors.q, q);
    uint32_t row_k[4], row_q[4], column[4];
    float inverse[4][2], last[4];  // last: 2^G of this thread's later token, shifted
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float s[2], up[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float unshifted = sum[i >> 1][2 * (i & 1) + e];
        s[e] = kShifted ? unshifted + kShift : unshifted;
        up[e] = fast_exp2(s[e]);
        inverse[i][e] = k[i][e] * fast_exp2(-s[e]);
        if ((i & 1) != 0) {
          last[i - 1 + e] = up[e];
          decay[i - 1 + e] = kShifted ? fast_exp2(unshifted) : up[e];
        }
      }
      row_k[i] = pack<__nv_bfloat16>(k[i][0] * up[0], k[i][1] * up[1]);
      row_q[i] = pack<__nv_bfloat16>(q[i][0] * up[0], q[i][1] * up[1]);
      column[i] = pack<__nv_bfloat16>(inverse[i][0], inverse[i][1]);
      if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
        o.k[i] = kShifted ? multiply_pair(row_k[i], pack<__nv_bfloat16>(kBack, kBack)) : row_k[i];
        o.q[i] = kShifted ? multiply_pair(row_q[i], pack<__nv_bfloat16>(kBack, kBack)) : row_q[i];
      } else {
        const float up0 = kShifted ? up[0] * kBack : up[0], up1 = kShifted ? up[1] * kBack : up[1];
        o.k[i] = pack<Out>(k[i][0] * up0, k[i][1] * up1);
        o.q[i] = pack<Out>(q[i][0] * up0, q[i][1] * up1);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float end0 = __shfl_sync(~0u, last[2 * n], 28 + t),
                  end1 = __shfl_sync(~0u, last[2 * n + 1], 28 + t);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        o.keys[2 * n + h] = pack<Out>(inverse[2 * n + h][0] * end0, inverse[2 * n + h][1] * end1);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma<__nv_bfloat16>(l[n], row_k, column[n], column[2 + n]);
      mma<__nv_bfloat16>(p[n], row_q, column[n], column[2 + n]);
    }
  }

  __device__ __forceinline__ static void steep(int t, const float (&sum)[2][4], const uint32_t (&kr)[4],
                                               const uint32_t (&qr)[4], const Factors& factors,
                                               float (&decay)[4], Operands& o, float (&l)[2][4],
                                               float (&p)[2][4]) {
    float k[4][2], q[4][2];
    scaled(kr, factors.k, k);
    scaled(qr, factors.q, q);
    uint32_t first_k[4], first_q[4];    // rows for the columns 0 to 7, relative to token 4
    uint32_t second_k[4], second_q[4];  // for the columns 8 to 15, relative to token 12
    uint32_t column[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float anchor[2][2], end[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        anchor[0][e] = __shfl_sync(~0u, sum[n][e], 16 + t);
        anchor[1][e] = __shfl_sync(~0u, sum[n][2 + e], 16 + t);
        end[e] = __shfl_sync(~0u, sum[n][2 + e], 28 + t);
        decay[2 * n + e] = fast_exp2(sum[n][2 + e]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * n + h;
        float own[2], earlier[2], inverse[2], up[2], down[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float s = sum[n][2 * h + e];
          own[e] = fast_exp2(s - anchor[h][e]);
          inverse[e] = fast_exp2(anchor[h][e] - s);
          earlier[e] = h == 0 ? own[e] : fast_exp2(s - anchor[0][e]);
          up[e] = fast_exp2(s);
          down[e] = fast_exp2(end[e] - s);
        }
        first_k[i] = pack<__nv_bfloat16>(k[i][0] * earlier[0], k[i][1] * earlier[1]);
        first_q[i] = pack<__nv_bfloat16>(q[i][0] * earlier[0], q[i][1] * earlier[1]);
        second_k[i] = h == 0 ? 0 : pack<__nv_bfloat16>(k[i][0] * own[0], k[i][1] * own[1]);
        second_q[i] = h == 0 ? 0 : pack<__nv_bfloat16>(q[i][0] * own[0], q[i][1] * own[1]);
        column[i] = pack<__nv_bfloat16>(k[i][0] * inverse[0], k[i][1] * inverse[1]);
        o.k[i] = pack<Out>(k[i][0] * up[0], k[i][1] * up[1]);
        o.q[i] = pack<Out>(q[i][0] * up[0], q[i][1] * up[1]);
        o.keys[i] = pack<Out>(k[i][0] * down[0], k[i][1] * down[1]);
      }
    }
    mma<__nv_bfloat16>(l[0], first_k, column[0], column[2]);
    mma<__nv_bfloat16>(p[0], first_q, column[0], column[2]);
    mma<__nv_bfloat16>(l[1], second_k, column[1], column[3]);
    mma<__nv_bfloat16>(p[1], second_q, column[1], column[3]);
  }

  enum class Decay { kGentle, kShifted, kSteep };

  // gentle(), shifted or not, or steep().
  template <Decay kDecay>
  __device__ __forceinline__ static void add(int t, const float (&sum)[2][4], const uint32_t (&kr)[4],
                                             const uint32_t (&qr)[4], const Factors& factors,
                                             float (&decay)[4], Operands& o, float (&l)[2][4],
                                             float (&p)[2][4]) {
    if constexpr (kDecay == Decay::kSteep) {
      steep(t, sum, kr, qr, factors, decay, o, l, p);
    } else {
      gentle<kDecay == Decay::kShifted>(t, sum, kr, qr, factors, decay, o, l, p);
    }
  }
};

}  // namespace kilin::cuda
