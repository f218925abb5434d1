// SPDX-License-Identifier: Apache-2.0
// Gradients of a chunk (kda_backward_gradient_sm90.cuh): gates, and rows of tokens: q, k, beta.
#pragma once
#include "kernels/kda/kda_backward_block_sm90.cuh"

namespace kilin::cuda::backward {

// A gate with its derivatives, of a raw value x with its bias: log2 of the decay as log2_decay() makes it but
// not yet cut, and dg/dx and dg/dA_log of its natural logarithm. Without branches, so that tokens overlap.
struct GateSlopes {
  float log2, by_x, by_a_log;
};
__device__ __forceinline__ GateSlopes gate_slopes(KdaGate kind, float x, float rate, float lower_bound) {
  constexpr float kLn2 = 0.69314718f;
  const bool bounded = kind == KdaGate::kBounded, none = kind == KdaGate::kNone;
  const float z = (bounded ? rate * x : x) * kLog2e;
  const float e = fast_exp2(-fabsf(z));
  const float inverse = fast_reciprocal(1.0f + e);
  const float sigmoid = z < 0.0f ? e * inverse : inverse;
  const float soft = -rate * fmaf(e, log2_one_plus_over(e), fmaxf(z, 0.0f));
  const float bounded_slope = lower_bound * e * inverse * inverse * rate;
  GateSlopes result;
  result.log2 = none ? z : (bounded ? lower_bound * kLog2e * sigmoid : soft);
  result.by_x = none ? 1.0f : (bounded ? bounded_slope : -rate * sigmoid);
  result.by_a_log = none ? 0.0f : (bounded ? bounded_slope * x : soft * kLn2);
  return result;
}

// Cumulative gates of each sub-chunk, and sum_j kt_j dkt_j relative to its end.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::cumulative_gates() const {
  each_channel([&](int s, int channel) {
    const Channel c = channel_of(channel);
    float sum = 0.0f, keys = 0.0f;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = raw_gate(16 * s + i, channel);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = 16 * s + i;
      const GateSlopes gate =
          gate_slopes(args.inputs.gate_kind, x[i] + c.bias, c.rate, args.inputs.lower_bound);
      const float y = token < length ? fmaxf(gate.log2, -24.0f) : 0.0f;
      sum += y;
      floats(Shared::kLocal)[token * Shared::kLd + channel] = sum;
      keys = fmaf(keys, fast_exp2(y),
                  key(token, channel) * floats(Shared::kBack)[token * Shared::kLd + channel]);
    }
    floats(Shared::kTotal)[s * K + channel] = sum;
    floats(Shared::kKeySums)[s * K + channel] = keys;
  });
}

// Gradients of the raw gates, and this chunk's share of those of dt_bias and a_log.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::gate_gradients() const {
  float rate_sum = 0.0f;
  each_channel([&](int s, int channel) {
    const Channel c = channel_of(channel);
    float carry = 0.0f;
#pragma unroll
    for (int part = 0; part < Shared::kStateParts; ++part)
      carry += floats(Shared::kStateSums)[part * K + channel];
    carry *= fast_exp2(between(0, 4, channel));
#pragma unroll
    for (int r = 0; r < 4; ++r)
      carry = fmaf(floats(Shared::kKeySums)[r * K + channel], fast_exp2(between(r + 1, 4, channel)), carry);
    for (int r = 3; r > s; --r) {
      const float sum = floats(Shared::kSubSums)[r * K + channel];
      carry = passes(floats(Shared::kKeySums)[r * K + channel]) ? sum + carry : sum;
    }
    float bias_sum = 0.0f;
    GateElement* to = args.d_gate == nullptr
                          ? nullptr
                          : static_cast<GateElement*>(args.d_gate) + first * args.d_gate_stride +
                                static_cast<int64_t>(head) * K + channel;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = raw_gate(16 * s + i, channel);
#pragma unroll
    for (int i = 15; i >= 0; --i) {
      const int token = 16 * s + i;
      const GateSlopes gate =
          gate_slopes(args.inputs.gate_kind, x[i] + c.bias, c.rate, args.inputs.lower_bound);
      const float local = floats(Shared::kLocal)[token * Shared::kLd + channel];
      const bool cut = !passes(local) && token < length;
      carry = cut ? 0.0f : carry;
      const float dg = cut || token >= length ? 0.0f : local + carry;
      const float dx = dg == 0.0f ? 0.0f : dg * gate.by_x;
      bias_sum += dx;
      rate_sum += dg == 0.0f ? 0.0f : dg * gate.by_a_log;
      if (to != nullptr && token < length) to[token * args.d_gate_stride] = static_cast<GateElement>(dx);
    }
    floats(Shared::kBiasSums)[s * K + channel] = bias_sum;
  });
  rate_sum = lane_sum<32>(rate_sum);
  if (lane == 0) floats(Shared::kRateSums)[warp] = rate_sum;
}

// Rows of tokens: gradients of q, k and beta.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::row_gradients() const {
  const KdaPrepareArgs& in = args.inputs;
  for (int r = warp; r < length; r += Shared::kThreads / 32) {
    float dq[K / 32], dk[K / 32];
    float along_q = 0.0f, along_k = 0.0f, by_beta = 0.0f;
    const float k_norm = floats(Shared::kNorms)[r];
#pragma unroll
    for (int i = 0; i < K / 32; ++i) {
      const int channel = lane + 32 * i;
      const int at = r * Shared::kLd + channel;
      const float k = raw(Shared::kRawK, r, channel), q = raw(Shared::kRawQ, r, channel);
      const float forward = floats(Shared::kDK)[at];
      dq[i] = floats(Shared::kDQ)[at];
      dk[i] = forward + floats(Shared::kBack)[at];
      along_q = fmaf(q, dq[i], along_q);
      along_k = fmaf(k, dk[i], along_k);
      by_beta = fmaf(k, forward, by_beta);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      along_q += __shfl_xor_sync(~0u, along_q, d);
      along_k += __shfl_xor_sync(~0u, along_k, d);
      by_beta += __shfl_xor_sync(~0u, by_beta, d);
    }
    // y = x r: dx = r (dy - x (x . dy) r^2); q has its scale as well
    const float q_factor = floats(Shared::kNorms)[kChunk + r];
    const float q_norm = in.scale != 0.0f ? q_factor / in.scale : 0.0f;
    const float q_along = in.l2norm ? along_q * q_norm * q_norm : 0.0f;
    const float k_along = in.l2norm ? along_k * k_norm * k_norm : 0.0f;
    const int64_t token = first + r;
    const int64_t kv_head = head / (in.value_heads / in.heads);
#pragma unroll
    for (int i = 0; i < K / 32; ++i) {
      const int channel = lane + 32 * i;
      const float q = q_factor * (dq[i] - raw(Shared::kRawQ, r, channel) * q_along);
      const float k = k_norm * (dk[i] - raw(Shared::kRawK, r, channel) * k_along);
      if (args.wide_keys) {
        const int64_t at = (token * in.value_heads + head) * K + channel;
        static_cast<float*>(args.d_q)[at] = q;
        static_cast<float*>(args.d_k)[at] = k;
      } else {
        if (args.d_q != nullptr)
          static_cast<Element*>(args.d_q)[token * args.d_q_stride + kv_head * K + channel] =
              static_cast<Element>(q);
        if (args.d_k != nullptr)
          static_cast<Element*>(args.d_k)[token * args.d_k_stride + kv_head * K + channel] =
              static_cast<Element>(k);
      }
    }
    if (lane == 0 && args.d_beta != nullptr) {
      const float sum = fmaf(by_beta, k_norm, floats(Shared::kValueSums)[r]);  // beta dbeta
      const float x = cuda::load(in.beta, in.beta_type, token * in.beta_stride + head);
      const float d = in.beta_is_logit ? sum / (1.0f + __expf(x)) : sum / x;
      cuda::store(args.d_beta, args.d_beta_type, token * args.d_beta_stride + head, d);
    }
  }
}

template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::store_sums() const {
  float* to = args.sums + (chunk * args.inputs.value_heads + head) * (1 + K);
  if (thread < K) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < 4; ++s) sum += floats(Shared::kBiasSums)[s * K + thread];
    to[1 + thread] = sum;
  } else if (thread == K) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Shared::kThreads / 32; ++w) sum += floats(Shared::kRateSums)[w];
    to[0] = sum;
  }
}

}  // namespace kilin::cuda::backward
