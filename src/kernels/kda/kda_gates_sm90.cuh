// SPDX-License-Identifier: Apache-2.0
// From raw gates to log2 decays, and from raw beta to beta, for the chunk kernels and the gradient kernels.
#pragma once
#include "kernels/cuda/ptx.cuh"
#include "kernels/kda/kda.h"

namespace kilin::cuda {

constexpr float kLog2e = 1.44269504f;

// log2(1 + e) / e for e in [0, 1], a polynomial (relative error 9e-6): what 1 + e loses would add up over a
// long, slow decay.
__device__ __forceinline__ float log2_one_plus_over(float e) {
  float tail = fmaf(e, -0.0344359092f, 0.1460329f);
  tail = fmaf(e, tail, -0.303036213f);
  tail = fmaf(e, tail, 0.469174087f);
  tail = fmaf(e, tail, -0.720426142f);
  return fmaf(e, tail, 1.44268286f);
}

// What a head's gates have in common: z = factor (x + bias), and the log2 decay as rate times a function of
// z.
struct GateCurve {
  float factor, rate;
};

// speed: e^a_log.
__device__ __forceinline__ GateCurve gate_curve(KdaGate kind, float speed, float lower_bound) {
  if (kind == KdaGate::kBounded) return {-speed * kLog2e, lower_bound * kLog2e};
  return {kLog2e, -speed};
}

// log2 of the decay of one token, at least -24; bias: times the factor.
template <KdaGate kGate>
__device__ __forceinline__ float log2_decay(float x, float bias, const GateCurve& curve) {
  float y;
  if constexpr (kGate == KdaGate::kSoftplus) {
    // -e^A log2(1 + e^(x + b)) = rate (max(z, 0) + log2(1 + 2^-|z|)), z = (x + b) log2 e
    const float z = fmaf(x, curve.factor, bias);
    const float e = fast_exp2(-fabsf(z));
    y = curve.rate * fmaf(e, log2_one_plus_over(e), fmaxf(z, 0.0f));
  } else if constexpr (kGate == KdaGate::kBounded) {
    // lower_bound log2 e / (1 + e^(-e^A (x + b)))
    y = curve.rate * fast_reciprocal(1.0f + fast_exp2(fmaf(x, curve.factor, bias)));
  } else {
    y = x * curve.factor;
  }
  return fmaxf(y, -24.0f);
}

// The gates of 16 tokens and 16 channels: x[n][half][e] is that of token 2t + e + 8 half and channel g + 8 n,
// where a B operand has it. Raw ones come from shared memory, `at` the address for ldmatrix; floats from
// `rows`, channel g of the first token, rows `stride` apart, `tokens` of them.
template <class GateElement>
__device__ __forceinline__ void raw_gates(uint32_t at, const float* rows, int64_t stride, int t, int tokens,
                                          float (&x)[2][2][2]) {
  if constexpr (sizeof(GateElement) == 2) {
    uint32_t r[4];
    ldmatrix_trans(r, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<GateElement>(r[i]);
      x[i >> 1][i & 1][0] = pair.x;
      x[i >> 1][i & 1][1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = 2 * t + (i & 1) + 8 * ((i >> 1) & 1);
      x[i >> 2][(i >> 1) & 1][i & 1] = token < tokens ? rows[token * stride + 8 * (i >> 2)] : 0.0f;
    }
  }
}

// Raw gates become log2 decays, 0 for tokens from `tokens` on; bias(n): of channel g + 8 n.
template <KdaGate kGate, class Bias>
__device__ __forceinline__ void log2_decays(Bias bias, const GateCurve& curve, int t, int tokens,
                                            float (&x)[2][2][2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float scaled = bias(n) * curve.factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i >> 1][i & 1] = log2_decay<kGate>(x[n][i >> 1][i & 1], scaled, curve);
  }
  if (tokens < 16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (2 * t + (i & 1) + 8 * ((i >> 1) & 1) >= tokens) x[i >> 2][(i >> 1) & 1][i & 1] = 0.0f;
    }
  }
}

__device__ __forceinline__ float beta_of(float x, bool is_logit, float scale) {
  if (is_logit) x = 1.0f / (1.0f + __expf(-x));
  return x * scale;
}

}  // namespace kilin::cuda
