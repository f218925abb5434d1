// SPDX-License-Identifier: Apache-2.0
// S <- (I - b k k^T) Diag(a) S + b k v^T, o = S^T q. Eight lanes share a row of S (V x K): channel 8 j +
// lane.
#include "kernels/cuda/check.h"
#include "kernels/cuda/scalar.cuh"
#include "kernels/cuda/sequences.cuh"
#include "kernels/kda/kda_recurrent_cuda.h"

namespace kilin {
namespace cuda {
namespace {

constexpr int kRowsPerBlock = 16;  // 4 warps of 4 rows

// In fp32, for one token after the other; log2_decay() (kda_gates_sm90.cuh) has what 16-bit operands need.
__device__ __forceinline__ float log_decay(KdaGate kind, float x, float speed, float lower_bound) {
  switch (kind) {
    case KdaGate::kSoftplus:
      return -speed * (x > 20.0f ? x : log1pf(expf(x)));
    case KdaGate::kBounded:
      return lower_bound / (1.0f + expf(-speed * x));
    case KdaGate::kNone:
      return x;
  }
  return 0.0f;
}

// A token's inputs, raw, as one lane needs them.
template <int kOwn>
struct Token {
  float q[kOwn], k[kOwn], gate[kOwn], v, beta;
};

template <int kOwn>
struct Recurrence {
  const KdaCudaParams& p;
  int lane, head, value_head, row;
  float speed, bias[kOwn], s[kOwn];

  __device__ __forceinline__ int channel(int j) const { return 8 * j + lane; }

  __device__ __forceinline__ void load(int64_t t, Token<kOwn>& x) const {
    const int64_t q = t * p.q.stride + static_cast<int64_t>(head) * p.key_dim,
                  k = t * p.k.stride + static_cast<int64_t>(head) * p.key_dim,
                  gate = t * p.gate.stride + static_cast<int64_t>(value_head) * p.key_dim;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool valid = channel(j) < p.key_dim;
      x.q[j] = valid ? cuda::load(p.q.data, p.type, q + channel(j)) : 0.0f;
      x.k[j] = valid ? cuda::load(p.k.data, p.type, k + channel(j)) : 0.0f;
      x.gate[j] = valid ? cuda::load(p.gate.data, p.gate_type, gate + channel(j)) : 0.0f;
    }
    x.v = row < p.value_dim
              ? cuda::load(p.v.data, p.type,
                           t * p.v.stride + static_cast<int64_t>(value_head) * p.value_dim + row)
              : 0.0f;
    x.beta = cuda::load(p.beta.data, p.beta_type, t * p.beta.stride + value_head);
  }

  // One token; returns o of the row.
  __device__ __forceinline__ float step(const Token<kOwn>& x) {
    float q_norm = p.scale, k_norm = 1.0f;
    if (p.l2norm) {
      float q_square = 0.0f, k_square = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        q_square = fmaf(x.q[j], x.q[j], q_square);
        k_square = fmaf(x.k[j], x.k[j], k_square);
      }
      q_norm *= rsqrtf(lane_sum<8>(q_square) + 1e-6f);
      k_norm = rsqrtf(lane_sum<8>(k_square) + 1e-6f);
    }
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      s[j] *= expf(log_decay(p.gate_kind, x.gate[j] + bias[j], speed, p.lower_bound));
      dot = fmaf(s[j], x.k[j], dot);
    }
    const float beta = p.beta_scale * (p.beta_is_logit ? 1.0f / (1.0f + expf(-x.beta)) : x.beta);
    const float written = beta * (x.v - k_norm * lane_sum<8>(dot)) * k_norm;
    float out = 0.0f;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      s[j] = fmaf(written, x.k[j], s[j]);
      out = fmaf(s[j], x.q[j], out);
    }
    return q_norm * lane_sum<8>(out);
  }
};

template <int kOwn>
__global__ void __launch_bounds__(128) kda_recurrent(const __grid_constant__ KdaCudaParams p) {
  const int parts = (p.value_dim + kRowsPerBlock - 1) / kRowsPerBlock;
  const int part = blockIdx.x % parts, pair = blockIdx.x / parts;
  const int value_head = pair % p.value_heads, number = pair / p.value_heads;
  const int row = part * kRowsPerBlock + (threadIdx.x >> 3);
  Recurrence<kOwn> x{p, static_cast<int>(threadIdx.x & 7), value_head / (p.value_heads / p.heads), value_head,
                     row};
  const bool stored = row < p.value_dim;
  x.speed = p.gate_kind != KdaGate::kNone && p.a_log != nullptr ? expf(p.a_log[value_head]) : 1.0f;
  const auto place = [&](const CudaStates& states, int64_t slot, int j) {
    return slot * states.slot_stride + (static_cast<int64_t>(value_head) * p.value_dim + row) * p.key_dim +
           x.channel(j);
  };
  const auto slot_of = [&](const CudaStates& states) {
    return states.data == nullptr ? -1 : states.slots != nullptr ? states.slots[number] : number;
  };
  const int64_t from = slot_of(p.initial), to = slot_of(p.final);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const bool valid = x.channel(j) < p.key_dim;
    x.bias[j] = valid && p.gate_kind != KdaGate::kNone && p.dt_bias != nullptr
                    ? p.dt_bias[value_head * p.key_dim + x.channel(j)]
                    : 0.0f;
    x.s[j] = valid && stored && from >= 0
                 ? cuda::load(p.initial.data, p.initial.type, place(p.initial, from, j))
                 : 0.0f;
  }
  const Sequences sequences{p.cu_seqlens, p.wide_seqlens, p.sequences, p.tokens};
  const int64_t end = sequences.begin(number + 1);
  Token<kOwn> now, next;
  int64_t t = sequences.begin(number);
  if (t < end) x.load(t, next);
  for (; t < end; ++t) {
    now = next;
    if (t + 1 < end) x.load(t + 1, next);
    const float out = x.step(now);
    if (stored && x.lane == 0) {
      store(p.out, p.type, t * p.out_stride + static_cast<int64_t>(value_head) * p.value_dim + row, out);
    }
  }
  if (to < 0 || !stored) return;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (x.channel(j) < p.key_dim) store(p.final.data, p.final.type, place(p.final, to, j), x.s[j]);
  }
}

}  // namespace
}  // namespace cuda

void kda_recurrent_cuda(const KdaCudaParams& params, CUstream_st* stream) {
  validate_recurrent(params);
  if (params.sequences == 0) return;
  const int64_t parts = (params.value_dim + cuda::kRowsPerBlock - 1) / cuda::kRowsPerBlock;
  const int64_t blocks = parts * params.value_heads * params.sequences;
  check(blocks < (int64_t{1} << 31), "kda_recurrent_cuda: {} blocks are too many for one launch", blocks);
  const auto run = [&](auto* kernel) {
    kernel<<<static_cast<unsigned>(blocks), 128, 0, stream>>>(params);
    check_launch("kda_recurrent");
  };
  if (params.key_dim <= 64) {
    run(cuda::kda_recurrent<8>);
  } else if (params.key_dim <= 128) {
    run(cuda::kda_recurrent<16>);
  } else {
    run(cuda::kda_recurrent<32>);
  }
}

}  // namespace kilin
