// SPDX-License-Identifier: Apache-2.0
// Parts of the decode kernel (kda_decode_cuda.cu): a lane's piece of the state, where a CTA stands, and what
// a thread does of the convolution and the gate.
#pragma once
#include <cuda_runtime.h>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/scalar.cuh"
#include "kernels/kda/kda_decode_cuda.h"

namespace kilin::kda_decode {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTaps = kKdaDecodeTaps;
constexpr int kHistory = kTaps - 1;
constexpr int kMaxCluster = 8;

// Eight channels of one row of the state, as loaded. Lane l of the row holds the channels first(l) .. + 3 and
// second(l) .. + 3: each load instruction covers whole 32-byte sectors of consecutive lanes.
template <class State, int K>
struct Piece;

template <int K>
struct Piece<float, K> {
  float4 a, b;
  static __device__ int first(int lane) { return 4 * lane; }
  static __device__ int second(int lane) { return K / 2 + 4 * lane; }
  __device__ void clear() { a = b = float4{0.0f, 0.0f, 0.0f, 0.0f}; }
  __device__ void load(const float* row, int lane) {
    a = __ldcs(reinterpret_cast<const float4*>(row + first(lane)));
    b = __ldcs(reinterpret_cast<const float4*>(row + second(lane)));
  }
  __device__ void expand(float (&s)[8]) const {
    s[0] = a.x, s[1] = a.y, s[2] = a.z, s[3] = a.w;
    s[4] = b.x, s[5] = b.y, s[6] = b.z, s[7] = b.w;
  }
  static __device__ void store(float* row, int lane, const float (&s)[8]) {
    __stcs(reinterpret_cast<float4*>(row + first(lane)), float4{s[0], s[1], s[2], s[3]});
    __stcs(reinterpret_cast<float4*>(row + second(lane)), float4{s[4], s[5], s[6], s[7]});
  }
};

template <int K>
struct Piece<__nv_bfloat16, K> {
  uint4 bits;
  static __device__ int first(int lane) { return 8 * lane; }
  static __device__ int second(int lane) { return 8 * lane + 4; }
  __device__ void clear() { bits = uint4{0, 0, 0, 0}; }
  __device__ void load(const __nv_bfloat16* row, int lane) {
    bits = __ldcs(reinterpret_cast<const uint4*>(row + first(lane)));
  }
  __device__ void expand(float (&s)[8]) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<__nv_bfloat16>(words[i]);
      s[2 * i] = pair.x;
      s[2 * i + 1] = pair.y;
    }
  }
  static __device__ void store(__nv_bfloat16* row, int lane, const float (&s)[8]) {
    uint32_t words[4];
    pack_operand<__nv_bfloat16>(s, words);
    __stcs(reinterpret_cast<uint4*>(row + first(lane)), uint4{words[0], words[1], words[2], words[3]});
  }
};

// Where a CTA stands: sequence, heads, rows, tokens, slots.
struct Place {
  int sequence, head, value_head, row;  // row: the first of this CTA's value rows
  int64_t begin;                        // first token
  int tokens;
  int accepted;
  int read_slot, write_slot, conv_slot;
  bool padding;
};

template <bool kMulti>
__device__ __forceinline__ Place find_place(const KdaDecodeCudaParams& p, int n, int value_head, int group,
                                            int row) {
  Place at;
  // First of all, and all three together: the state's address hangs on them.
  const uint32_t read_slot = issue_32(p.initial.slots, n, p.initial.slots != nullptr);
  const uint32_t write_slot = issue_32(p.final.slots, n, p.final.slots != nullptr);
  const uint32_t conv_slot = issue_32(p.conv.slots, n, p.conv.slots != nullptr);
  at.row = row;
  at.sequence = n;
  at.value_head = value_head;
  at.head = group == 1 ? value_head : value_head / group;
  at.begin = n;
  at.tokens = 1;
  at.accepted = 1;
  if constexpr (kMulti) {
    // Not by Sequences: 40 instructions more in front of the loads of the state.
    if (p.cu_seqlens == nullptr) {
      at.tokens = static_cast<int>(p.tokens / p.sequences);
      at.begin = static_cast<int64_t>(n) * at.tokens;
    } else if (p.wide_seqlens) {
      at.begin = static_cast<const int64_t*>(p.cu_seqlens)[n];
      at.tokens = static_cast<int>(static_cast<const int64_t*>(p.cu_seqlens)[n + 1] - at.begin);
    } else {
      at.begin = static_cast<const int32_t*>(p.cu_seqlens)[n];
      at.tokens = static_cast<int>(static_cast<const int32_t*>(p.cu_seqlens)[n + 1] - at.begin);
    }
    if (p.accepted != nullptr) {
      at.accepted = max(1, min(p.accepted[n], static_cast<int>(p.token_slot_stride)));
    }
  }
  at.read_slot = p.initial.slots != nullptr ? static_cast<int>(read_slot) : n;
  at.write_slot = p.final.slots != nullptr ? static_cast<int>(write_slot) : n;
  at.conv_slot = p.conv.slots != nullptr ? static_cast<int>(conv_slot) : n;
  if (kMulti && p.token_slots != nullptr)
    at.read_slot = p.token_slots[n * p.token_slot_stride + at.accepted - 1];
  at.padding = (p.initial.data != nullptr ? at.read_slot : at.write_slot) < p.first_slot;
  return at;
}

// The part of the prologue that belongs to one thread: channel `index` of q and k (threads 0 to 127, "keys"),
// or of v and the gate. Values of the current token in x, the convolution's history before it in history.
template <int K, int kRows>
struct Channel {
  bool keys, active[2];  // active[0]: q or v, active[1]: k or the gate
  int index;
  int channel[2];  // in the convolution's state
  RawFour weight[2];
  uint32_t history[2][kHistory];  // bits of 16-bit values
  RawValue x[2], beta, a, bias;

  __device__ __forceinline__ void setup(const KdaDecodeCudaParams& p, const Place& at) {
    const int thread = static_cast<int>(threadIdx.x);
    keys = thread < 128;
    index = keys ? thread : thread - 128;
    active[0] = index < (keys ? K : kRows);
    active[1] = index < K;
    const int key_channels = p.heads * K;
    const int key = at.head * K + index;
    const int value = at.value_head * K + at.row + index;
    channel[0] = keys ? key : 2 * key_channels + value;
    channel[1] = key_channels + key;
    const bool gate = !keys && active[1] && p.gate_kind != KdaGate::kNone;
    a = issue(p.a_log, CudaType::kF32, at.value_head, gate && p.a_log != nullptr);
    bias = issue(p.dt_bias, CudaType::kF32, at.value_head * K + index, gate && p.dt_bias != nullptr);
    const bool conv = p.conv.q_weight != nullptr;
    weight[0] = issue_4(keys ? p.conv.q_weight : p.conv.v_weight, p.conv.weight_type, keys ? key : value,
                        p.conv.tap_stride, conv && active[0]);
    weight[1] =
        issue_4(p.conv.k_weight, p.conv.weight_type, key, p.conv.tap_stride, conv && keys && active[1]);
  }

  // Behind the loads that need no slot.
  __device__ __forceinline__ void load_history(const KdaDecodeCudaParams& p, const Place& at) {
    const int channels = (2 * p.heads + p.value_heads) * K;
    const uint16_t* state = static_cast<const uint16_t*>(p.conv.state) + at.conv_slot * p.conv.slot_stride +
                            static_cast<int64_t>(at.accepted - 1) * channels;
    const bool there = p.conv.q_weight != nullptr && at.conv_slot >= 0;
#pragma unroll
    for (int i = 0; i < kHistory; ++i) {
      history[0][i] = issue_16(state, i * channels + channel[0], there && active[0]);
      history[1][i] = issue_16(state, i * channels + channel[1], there && keys && active[1]);
    }
  }

  __device__ __forceinline__ void load_token(const KdaDecodeCudaParams& p, const Place& at, int64_t token,
                                             bool there) {
    const int key = at.head * K + index;
    const int gate = at.value_head * K + index;
    const int value = at.value_head * K + at.row + index;
    x[0] = {0, issue_16(keys ? p.q.data : p.v.data,
                        token * (keys ? p.q.stride : p.v.stride) + (keys ? key : value), there && active[0])};
    x[1] = issue(keys ? p.k.data : p.gate.data, keys ? p.type : p.gate_type,
                 token * (keys ? p.k.stride : p.gate.stride) + (keys ? key : gate), there && active[1]);
    beta = issue(p.beta.data, p.beta_type, token * p.beta.stride + at.value_head, there);
  }

  // The convolution of q, k or v; moves the history on.
  __device__ __forceinline__ float convolve(const KdaDecodeCudaParams& p, int side) {
    const float now = from_bits(static_cast<uint16_t>(x[side].narrow), p.type);
    if (p.conv.q_weight == nullptr) return now;
    const float4 w = weight[side].value(p.conv.weight_type);
    uint32_t(&h)[kHistory] = history[side];
    float sum = w.x * from_bits(static_cast<uint16_t>(h[0]), p.type);
    sum = fmaf(w.y, from_bits(static_cast<uint16_t>(h[1]), p.type), sum);
    sum = fmaf(w.z, from_bits(static_cast<uint16_t>(h[2]), p.type), sum);
    sum = fmaf(w.w, now, sum);
    h[0] = h[1], h[1] = h[2], h[2] = x[side].narrow;
    return p.conv.silu ? sum * sigmoid(sum) : sum;
  }

  // As log_decay() in kda_recurrent_cuda.cu; with one function for both, that kernel was 5 to 7 % slower.
  __device__ __forceinline__ float decay(const KdaDecodeCudaParams& p) const {
    const float g = x[1].value(p.gate_type);
    if (p.gate_kind == KdaGate::kNone) return expf(g);
    const float factor = expf(a.value(CudaType::kF32));
    const float y = g + bias.value(CudaType::kF32);
    if (p.gate_kind == KdaGate::kBounded) return expf(p.lower_bound / (1.0f + expf(-factor * y)));
    return expf(-factor * (y > 20.0f ? y : log1pf(expf(y))));
  }

  // Rows of the convolution's state behind token t of `tokens`. With token_slots every input is kept (row 2 +
  // t), so that the next call can start behind any of them; otherwise the last three, once.
  __device__ __forceinline__ void store_history(const KdaDecodeCudaParams& p, const Place& at, int t,
                                                bool owner) const {
    const bool keep_all = p.token_slots != nullptr;
    const bool mine = p.conv.q_weight != nullptr && at.conv_slot >= 0 && active[0] && (owner || !keys);
    if (!mine || (!keep_all && t + 1 < at.tokens)) return;
    const int channels = (2 * p.heads + p.value_heads) * K;
    uint16_t* state = static_cast<uint16_t*>(p.conv.state) + at.conv_slot * p.conv.slot_stride;
    const int from = keep_all && t > 0 ? kHistory - 1 : 0;  // the earlier rows are written by token 0
    const int base = keep_all ? t : 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == 1 && !keys) break;
#pragma unroll
      for (int i = 0; i < kHistory; ++i) {
        if (i >= from)
          state[static_cast<int64_t>(base + i) * channels + channel[side]] =
              static_cast<uint16_t>(history[side][i]);
      }
    }
  }
};

// What one token brings to the rows of the state: q and k with their norms' factors, the decay, of a lane's
// channels.
template <class Part>
struct Keys {
  float q[8], k[8], decay[8];
  float k_dot_q;

  // sums: q . q, k . k, q . k of warps 0 to 3
  __device__ __forceinline__ Keys(const KdaDecodeCudaParams& p, const float (&sums)[3][4],
                                  const float* shared_q, const float* shared_k, const float* shared_decay,
                                  int lane) {
    float totals[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) totals[i] = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
    const float q_factor = p.scale * (p.l2norm ? rsqrtf(totals[0] + 1e-6f) : 1.0f);
    const float k_factor = p.l2norm ? rsqrtf(totals[1] + 1e-6f) : 1.0f;
    k_dot_q = totals[2] * q_factor * k_factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = i < 4 ? Part::first(lane) + i : Part::second(lane) + i - 4;
      q[i] = shared_q[channel] * q_factor;
      k[i] = shared_k[channel] * k_factor;
      decay[i] = shared_decay[channel];
    }
  }

  // One row: s becomes the new state, the row's output is returned (by all lanes of the row).
  template <int kLanes>
  __device__ __forceinline__ float update(float (&s)[8], float beta, float v) const {
    float recalled = 0.0f;
    float out = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s[i] *= decay[i];
      recalled = fmaf(s[i], k[i], recalled);
      out = fmaf(s[i], q[i], out);
    }
    // Both sums side by side, for the latency: two lane_sum() would follow one another.
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      recalled += __shfl_xor_sync(~0u, recalled, mask);
      out += __shfl_xor_sync(~0u, out, mask);
    }
    const float d = beta * (v - recalled);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = fmaf(d, k[i], s[i]);
    return fmaf(d, k_dot_q, out);
  }
};

// Prologue of a token: q, k, decay and v into shared memory, and the sums for the norms of q and k. Returns
// beta.
template <int K, int kRows, class Memory>
__device__ __forceinline__ float prepare(const KdaDecodeCudaParams& p, Channel<K, kRows>& mine,
                                         Memory& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  if (mine.keys) {
    const float q = mine.active[0] ? mine.convolve(p, 0) : 0.0f;
    const float k = mine.active[0] ? mine.convolve(p, 1) : 0.0f;
    if (mine.active[0]) shared.q[mine.index] = q, shared.k[mine.index] = k;
    const float qq = lane_sum<32>(q * q);
    const float kk = lane_sum<32>(k * k);
    const float qk = lane_sum<32>(q * k);
    if (thread % 32 == 0) {
      shared.sums[0][thread / 32] = qq, shared.sums[1][thread / 32] = kk, shared.sums[2][thread / 32] = qk;
    }
  } else {
    if (mine.active[1]) shared.decay[mine.index] = mine.decay(p);
    if (mine.active[0]) shared.v[mine.index] = mine.convolve(p, 0);
  }
  const float beta = mine.beta.value(p.beta_type);
  return p.beta_scale * (p.beta_is_logit ? 1.0f / (1.0f + expf(-beta)) : beta);
}

// The gated norm of one output value; `squares` sums the squares of the head's outputs.
__device__ __forceinline__ float normalise(const KdaDecodeCudaParams& p, float y, float squares, float weight,
                                           uint32_t gate_bits) {
  y *= rsqrtf(squares * (1.0f / static_cast<float>(p.value_dim)) + p.norm.eps) * weight;
  if (p.norm.activation == GateActivation::kNone) return y;
  const float gate = from_bits(static_cast<uint16_t>(gate_bits), p.type);
  const float s = sigmoid(gate);
  return y * (p.norm.activation == GateActivation::kSilu ? gate * s : s);
}

}  // namespace kilin::kda_decode
