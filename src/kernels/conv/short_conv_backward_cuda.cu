// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv_cuda.cuh"

namespace kilin {
namespace {

using namespace short_conv;

// d silu(s) / d s
__device__ __forceinline__ float silu_slope(float s) {
  const float g = sigmoid(s);
  return g * fmaf(s, 1.0f - g, 1.0f);
}

// With d_t the gradient at the sum of token t (zero outside of the sequence):
//     du_t = sum_i w[i] d_{t + taps - 1 - i}       d_w[i] = sum_t d_t u_{t - taps + 1 + i}
// The walk goes taps - 1 tokens past the block's end, and emits du of the token taps - 1 behind; in front of
// a sequence these are the gradients of its initial state. Partial sums of d_w go to the workspace,
// [blocks][taps][channels].
template <CudaType kType, int kTaps>
__global__ void __launch_bounds__(kThreads, 4)
    short_conv_backward_kernel(const __grid_constant__ ShortConvCudaBackward b, float* partial,
                               const int block_tokens) {
  constexpr int kCount = 4;
  constexpr int kBehind = kTaps - 1;
  const ShortConvCudaParams& p = b.forward;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (channel >= p.channels) return;
  const Sequences sequences{p.cu_seqlens, p.wide_seqlens, p.sequences, p.tokens};
  int64_t t = static_cast<int64_t>(blockIdx.y) * block_tokens;
  const int64_t stop = min(t + block_tokens, p.tokens);
  float w[kCount][kTaps];
  float dw[kTaps][kCount] = {};
  load_weights(p, channel, w);
  const uint16_t* u = static_cast<const uint16_t*>(p.u.data) + channel;
  const uint16_t* dy = static_cast<const uint16_t*>(b.dy.data) + channel;
  uint16_t* du = static_cast<uint16_t*>(b.du) + channel;
  int n = sequences.find(t);
  while (t < stop) {
    while (sequences.begin(n + 1) <= t) ++n;
    const int64_t begin = sequences.begin(n);
    const int64_t sequence_end = sequences.begin(n + 1);
    const int64_t first = t;  // this run emits du of first .. end - 1
    const int64_t end = min(sequence_end, stop);
    const int64_t last = min(end + kBehind, sequence_end);  // tokens with a gradient that this run needs
    const int final_slot = b.d_final.data != nullptr ? slot_of(b.d_final, n) : -1;
    const uint16_t* d_final =
        static_cast<const uint16_t*>(b.d_final.data) + final_slot * b.d_final.slot_stride + channel;
    float window[kBehind][kCount];
    load_window<kType, kTaps, kCount>(p, begin, t - begin, slot_of(p.initial, n), channel, window);
    float d[kTaps][kCount] = {};  // gradients of the last taps tokens, oldest first
    uint2 next_u[kBatch];
    uint2 next_dy[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (t + i < last) {
        next_u[i] = __ldcs(reinterpret_cast<const uint2*>(u + (t + i) * p.u.stride));
        next_dy[i] = __ldcs(reinterpret_cast<const uint2*>(dy + (t + i) * b.dy.stride));
      }
    }
    for (; t < end + kBehind; t += kBatch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t now = t + i;
        if (now >= end + kBehind) break;
#pragma unroll
        for (int j = 0; j < kTaps - 1; ++j) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) d[j][c] = d[j + 1][c];
        }
        if (now < last) {
          float x[kCount];
          float g[kCount];
          float sum[kCount];
          unpack<kType>(next_u[i], x);
          unpack<kType>(next_dy[i], g);
          if (now + kBatch < last) {
            next_u[i] = __ldcs(reinterpret_cast<const uint2*>(u + (now + kBatch) * p.u.stride));
            next_dy[i] = __ldcs(reinterpret_cast<const uint2*>(dy + (now + kBatch) * b.dy.stride));
          }
          float before[kBehind][kCount];
#pragma unroll
          for (int j = 0; j < kBehind; ++j) {
#pragma unroll
            for (int c = 0; c < kCount; ++c) before[j][c] = window[j][c];
          }
          step(w, x, window, sum);
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            d[kTaps - 1][c] = p.silu ? g[c] * silu_slope(sum[c]) : g[c];
            const float mine = now < end ? d[kTaps - 1][c] : 0.0f;
#pragma unroll
            for (int j = 0; j < kBehind; ++j) dw[j][c] = fmaf(mine, before[j][c], dw[j][c]);
            dw[kTaps - 1][c] = fmaf(mine, x[c], dw[kTaps - 1][c]);
          }
        } else {
#pragma unroll
          for (int c = 0; c < kCount; ++c) d[kTaps - 1][c] = 0.0f;
        }
        const int64_t at = now - kBehind;
        const bool in_front = at < begin;  // only the run that begins the sequence comes here with it
        if (at < first && !(in_front && first == begin)) continue;
        if (in_front && b.d_initial.data == nullptr) continue;
        float sum[kCount] = {};
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
#pragma unroll
          for (int j = 0; j < kTaps; ++j) sum[c] = fmaf(w[c][kTaps - 1 - j], d[j][c], sum[c]);
        }
        // The final state holds the inputs of positions sequence_end - taps + 1 on.
        const int64_t row = at - (sequence_end - kBehind);
        if (row >= 0 && final_slot >= 0) {
          float more[kCount];
          unpack<kType>(*reinterpret_cast<const uint2*>(d_final + row * p.channels), more);
#pragma unroll
          for (int c = 0; c < kCount; ++c) sum[c] += more[c];
        }
        if (!in_front) {
          *reinterpret_cast<uint2*>(du + at * b.du_stride) = pack<kType>(sum);
        } else if (const int slot = slot_of(b.d_initial, n); slot >= 0) {
          uint16_t* rows =
              static_cast<uint16_t*>(b.d_initial.data) + slot * b.d_initial.slot_stride + channel;
          *reinterpret_cast<uint2*>(rows + (at - begin + kBehind) * p.channels) = pack<kType>(sum);
        }
      }
    }
    t = end;
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    float* at = partial + (static_cast<int64_t>(blockIdx.y) * kTaps + j) * p.channels + channel;
    *reinterpret_cast<float4*>(at) = float4{dw[j][0], dw[j][1], dw[j][2], dw[j][3]};
  }
}

// Sequences without tokens hand the gradient of their final state on to the initial one.
template <int kTaps>
__global__ void __launch_bounds__(kThreads)
    short_conv_empty_kernel(const __grid_constant__ ShortConvCudaBackward b) {
  const ShortConvCudaParams& p = b.forward;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  const int n = static_cast<int>(blockIdx.y);
  const Sequences sequences{p.cu_seqlens, p.wide_seqlens, p.sequences, p.tokens};
  const int to = slot_of(b.d_initial, n);
  if (channel >= p.channels || to < 0 || sequences.begin(n + 1) > sequences.begin(n)) return;
  const int from = b.d_final.data != nullptr ? slot_of(b.d_final, n) : -1;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    uint4 bits{};
    if (from >= 0) {
      bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(b.d_final.data) +
                                             from * b.d_final.slot_stride + i * p.channels + channel);
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(b.d_initial.data) + to * b.d_initial.slot_stride +
                              i * p.channels + channel) = bits;
  }
}

// Sums the partial d_w of all blocks in order: warp w of the CTA takes the blocks w, w + 8, ...
constexpr int kSumWarps = 8;
__global__ void __launch_bounds__(32 * kSumWarps)
    short_conv_sum_kernel(const float* partial, float* d_weight, int blocks, int taps, int64_t channels) {
  __shared__ float sums[kSumWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int tap = static_cast<int>(blockIdx.y);
  float sum = 0.0f;
  if (channel < channels) {
#pragma unroll 4
    for (int block = warp; block < blocks; block += kSumWarps) {
      sum += partial[(static_cast<int64_t>(block) * taps + tap) * channels + channel];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
#pragma unroll
  for (int i = 1; i < kSumWarps; ++i) sum += sums[i][lane];
  d_weight[channel * taps + tap] = sum;
}

int backward_block(const ShortConvCudaParams& p) {
  return tokens_per_block(p.tokens, columns(p.channels, 4), 256);
}

int64_t backward_blocks(const ShortConvCudaParams& p) {
  const int block = backward_block(p);
  return (p.tokens + block - 1) / block;
}

}  // namespace

size_t short_conv_backward_cuda_workspace(const ShortConvCudaBackward& b) {
  return static_cast<size_t>(backward_blocks(b.forward) * b.forward.taps * b.forward.channels) *
         sizeof(float);
}

void short_conv_backward_cuda(const ShortConvCudaBackward& b, void* workspace, size_t workspace_bytes,
                              CUstream_st* stream) {
  const ShortConvCudaParams& p = b.forward;
  validate(p);
  check_rows("dy", b.dy.data, b.dy.stride, p);
  check_rows("du", b.du, b.du_stride, p);
  check(b.d_weight != nullptr, "short_conv_backward: d_weight is null");
  const size_t needed = short_conv_backward_cuda_workspace(b);
  check(workspace_bytes >= needed && (needed == 0 || workspace != nullptr) &&
            reinterpret_cast<uintptr_t>(workspace) % 16 == 0,
        "short_conv_backward: the workspace has {} bytes, expected {}, aligned to 16", workspace_bytes,
        needed);
  const int64_t blocks = backward_blocks(p);
  check(blocks < 65536, "short_conv_backward: {} tokens are too many for one launch", p.tokens);
  float* partial = static_cast<float*>(workspace);
  if (blocks > 0) {
    dispatch(p, [&]<CudaType kType, int kTaps>() {
      short_conv_backward_kernel<kType, kTaps>
          <<<dim3(columns(p.channels, 4), static_cast<unsigned>(blocks)), kThreads, 0, stream>>>(
              b, partial, backward_block(p));
    });
    check_launch("short_conv_backward");
  }
  short_conv_sum_kernel<<<dim3(static_cast<unsigned>((p.channels + 31) / 32), p.taps), 32 * kSumWarps, 0,
                          stream>>>(partial, b.d_weight, static_cast<int>(blocks), p.taps, p.channels);
  check_launch("short_conv_sum");
  if (b.d_initial.data != nullptr && p.sequences > 0) {
    dispatch(p, [&]<CudaType kType, int kTaps>() {
      short_conv_empty_kernel<kTaps><<<dim3(columns(p.channels, 8), p.sequences), kThreads, 0, stream>>>(b);
    });
    check_launch("short_conv_empty");
  }
}

}  // namespace kilin
