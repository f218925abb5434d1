// SPDX-License-Identifier: Apache-2.0
// Gradients of a chunk (kda_backward_gradient_sm90.cuh): what pairs of tokens give.
#pragma once
#include "kernels/kda/kda_backward_block_sm90.cuh"

namespace kilin::cuda::backward {

// Pairs of tokens in different sub-chunks. A warp has kN times 8 channels.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::pairs_between() const {
  constexpr int kN = 1;
  const int channel0 = warp * 8 * kN;
  if (channel0 >= K) return;
  const float* dp = floats(Shared::kDP);
  const float* dm = floats(Shared::kDM);
  const auto element = [&](const float* x, int i, int j) { return round_tf32(x[i * Shared::kPairLd + j]); };
  const auto local = [&](int token, int channel) {
    return floats(Shared::kLocal)[token * Shared::kLd + channel];
  };
  // The columns' factors of accumulators, 2^log[channel]
  const auto scale_columns = [&](float(&d)[kN][4], const float(&factor)[kN][2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] *= factor[n][i & 1];
    }
  };
  const auto total_factor = [&](int s, float(&factor)[kN][2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        factor[n][e] = fast_exp2(floats(Shared::kTotal)[s * K + channel0 + 8 * n + 2 * t + e]);
    }
  };
  const auto add_to = [&](int place, int s, const float(&d)[kN][4], bool before) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = channel0 + 8 * n + 2 * t + e;
        const float factor = fast_exp2(before ? between(0, s, channel) : between(s + 1, 4, channel));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* x = floats(place) + (16 * s + g + 8 * h) * Shared::kLd + channel;
          *x = fmaf(*x, factor, d[n][2 * h + e]);
        }
      }
    }
  };
  {
    float by_p[3][kN][4] = {}, by_m[3][kN][4] = {};  // of sub-chunks 1 to 3
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      float factor[kN][2];
      total_factor(j, factor);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (i < j || j == 0) continue;
        scale_columns(by_p[i], factor);
        scale_columns(by_m[i], factor);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float b[kN][2];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const int channel = channel0 + 8 * n + g;
          const float end = floats(Shared::kTotal)[j * K + channel];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = 16 * j + 8 * k + t + 4 * e;
            b[n][e] = round_tf32(key(token, channel) * fast_exp2(end - local(token, channel)));
          }
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i < j) continue;
          const int r = 16 * (i + 1) + g, c = 16 * j + 8 * k + t;
          const float p0 = element(dp, r, c), p1 = element(dp, r + 8, c);
          const float p2 = element(dp, r, c + 4), p3 = element(dp, r + 8, c + 4);
          const float m0 = element(dm, r, c), m1 = element(dm, r + 8, c);
          const float m2 = element(dm, r, c + 4), m3 = element(dm, r + 8, c + 4);
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            mma_tf32(by_p[i][n], p0, p1, p2, p3, b[n][0], b[n][1]);
            mma_tf32(by_m[i][n], m0, m1, m2, m3, b[n][0], b[n][1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      add_to(Shared::kDQ, i + 1, by_p[i], true);
      add_to(Shared::kDK, i + 1, by_m[i], true);
    }
  }
  float back[3][kN][4] = {};  // of sub-chunks 0 to 2
#pragma unroll
  for (int i = 3; i > 0; --i) {
    float factor[kN][2];
    total_factor(i, factor);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (j < i && i < 3) scale_columns(back[j], factor);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float b[kN][2][2];  // of q and k
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int channel = channel0 + 8 * n + g;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 16 * i + 8 * k + t + 4 * e;
          const float up = fast_exp2(local(token, channel));
          b[n][0][e] = round_tf32(query(token, channel) * up);
          b[n][1][e] = round_tf32(key(token, channel) * up);
        }
      }
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (j >= i) continue;
        const int r = 16 * i + 8 * k + t, c = 16 * j + g;
        const float p0 = element(dp, r, c), p1 = element(dp, r, c + 8);
        const float p2 = element(dp, r + 4, c), p3 = element(dp, r + 4, c + 8);
        const float m0 = element(dm, r, c), m1 = element(dm, r, c + 8);
        const float m2 = element(dm, r + 4, c), m3 = element(dm, r + 4, c + 8);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          mma_tf32(back[j][n], p0, p1, p2, p3, b[n][0][0], b[n][0][1]);
          mma_tf32(back[j][n], m0, m1, m2, m3, b[n][1][0], b[n][1][1]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) add_to(Shared::kBack, j, back[j], false);
}

// Pairs of tokens in the same sub-chunk, and the gradient of g within the sub-chunk.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::pairs_within() const {
  each_channel([&](int s, int channel) {
    float* dq_column = floats(Shared::kDQ) + 16 * s * Shared::kLd + channel;
    float* dk_column = floats(Shared::kDK) + 16 * s * Shared::kLd + channel;
    float* back_column = floats(Shared::kBack) + 16 * s * Shared::kLd + channel;
    float* local_column = floats(Shared::kLocal) + 16 * s * Shared::kLd + channel;
    const float* dp = floats(Shared::kDP) + 16 * s * Shared::kPairLd + 16 * s;
    const float* dm = floats(Shared::kDM) + 16 * s * Shared::kPairLd + 16 * s;
    float decay[16], keys[16];
    float prefix = 1.0f, before = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float sum = local_column[i * Shared::kLd];
      decay[i] = fast_exp2(sum - before);
      before = sum;
      prefix *= decay[i];
      float by_p = 0.0f, by_m = 0.0f;
#pragma unroll
      for (int j4 = 0; j4 < i; j4 += 4) {
        const float4 p = *reinterpret_cast<const float4*>(dp + i * Shared::kPairLd + j4);
        const float4 m = *reinterpret_cast<const float4*>(dm + i * Shared::kPairLd + j4);
        const float ps[4] = {p.x, p.y, p.z, p.w}, ms[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
        for (int j = j4; j < j4 + 4; ++j) {
          if (j >= i) continue;
          keys[j] *= decay[i];
          by_p = fmaf(ps[j - j4], keys[j], by_p);
          by_m = fmaf(ms[j - j4], keys[j], by_m);
        }
      }
      keys[i] = key(16 * s + i, channel);
      by_p = fmaf(dp[i * Shared::kPairLd + i], keys[i], by_p);
      dq_column[i * Shared::kLd] = fmaf(dq_column[i * Shared::kLd], prefix, by_p);
      dk_column[i * Shared::kLd] = fmaf(dk_column[i * Shared::kLd], prefix, by_m);
    }
    float later[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) later[i] = back_column[i * Shared::kLd];
    float sum = 0.0f, next = 1.0f;
#pragma unroll
    for (int i = 15; i >= 0; --i) {
      const float k = key(16 * s + i, channel), q = query(16 * s + i, channel);
#pragma unroll
      for (int j4 = 0; j4 <= i; j4 += 4) {
        const float4 p = *reinterpret_cast<const float4*>(dp + i * Shared::kPairLd + j4);
        const float4 m = *reinterpret_cast<const float4*>(dm + i * Shared::kPairLd + j4);
        const float ps[4] = {p.x, p.y, p.z, p.w}, ms[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
        for (int j = j4; j < j4 + 4; ++j) {
          if (j > i) continue;
          later[j] = fmaf(later[j], next, fmaf(ps[j - j4], q, ms[j - j4] * k));
        }
      }
      next = decay[i];
      const float dk = dk_column[i * Shared::kLd], dq = dq_column[i * Shared::kLd];
      sum = fmaf(q, dq, fmaf(k, dk - later[i], sum));
      // a decay at its lower bound: what lies before has no influence, and rounding errors must not pass.
      // The mark tells gate_gradients(): two comparisons that differ in rounding would leave half of a sum.
      const bool cut = is_cut(decay[i]);
      if (cut) sum = 0.0f;
      local_column[i * Shared::kLd] = pass_marked(sum, !cut);
      back_column[i * Shared::kLd] = later[i];
    }
    floats(Shared::kSubSums)[s * K + channel] = sum;
    bool open = true;
#pragma unroll
    for (int i = 0; i < 16; ++i) open &= !is_cut(decay[i]);
    floats(Shared::kKeySums)[s * K + channel] = pass_marked(floats(Shared::kKeySums)[s * K + channel], open);
  });
}

}  // namespace kilin::cuda::backward
