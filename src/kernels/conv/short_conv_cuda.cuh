// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels of the short convolution share.
//
// A thread owns some neighbouring channels (16 bytes of them, 8 in the backward pass) and walks over a block
// of tokens with the window of inputs in registers, so every input is read once, but for taps - 1 at the
// start of a block. Loads run kBatch tokens ahead. A block may hold parts of several sequences ("runs").
#pragma once
#include <cuda_runtime.h>

#include "kernels/conv/short_conv_cuda.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/sequences.cuh"
#include "kernels/cuda/vector.cuh"

namespace kilin::short_conv {

using namespace cuda;

constexpr int kThreads = 128;
constexpr int kBatch = 4;

__device__ __forceinline__ int slot_of(const ConvStates& states, int n) {
  return states.slots != nullptr ? states.slots[n] : n;
}

// Bits of the input at `position` of a sequence, which may lie up to taps - 1 before its first token.
template <int kTaps, class Word>
__device__ __forceinline__ Word input_bits(const ShortConvCudaParams& p, int64_t begin, int64_t position,
                                           int slot, int64_t channel) {
  if (position >= 0) {
    const uint16_t* row = static_cast<const uint16_t*>(p.u.data) + (begin + position) * p.u.stride;
    return *reinterpret_cast<const Word*>(row + channel);
  }
  if (p.initial.data == nullptr || slot < 0) return Word{};
  const uint16_t* rows = static_cast<const uint16_t*>(p.initial.data) + slot * p.initial.slot_stride;
  return *reinterpret_cast<const Word*>(rows + (position + kTaps - 1) * p.channels + channel);
}

// The branch on the type stands outside: all loads of one kind are under way together.
template <int kTaps, int kCount>
__device__ __forceinline__ void load_weights(const ShortConvCudaParams& p, int64_t channel,
                                             float (&w)[kCount][kTaps]) {
  constexpr int kAll = kCount * kTaps;
  float* all = &w[0][0];
  if (p.weight_type == CudaType::kF32) {
    const float* from = static_cast<const float*>(p.weight) + channel * kTaps;
#pragma unroll
    for (int i = 0; i < kAll; ++i) all[i] = from[i];
  } else {  // 8 byte aligned: channel is a multiple of 4
    const uint2* from =
        reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.weight) + channel * kTaps);
    uint2 bits[kAll / 4];
#pragma unroll
    for (int i = 0; i < kAll / 4; ++i) bits[i] = from[i];
#pragma unroll
    for (int i = 0; i < kAll / 4; ++i) {
      all[4 * i] = from_bits(bits[i].x & 0xffff, p.weight_type);
      all[4 * i + 1] = from_bits(bits[i].x >> 16, p.weight_type);
      all[4 * i + 2] = from_bits(bits[i].y & 0xffff, p.weight_type);
      all[4 * i + 3] = from_bits(bits[i].y >> 16, p.weight_type);
    }
  }
}

// The inputs before position `at` of a sequence, oldest first.
template <CudaType kType, int kTaps, int kCount>
__device__ __forceinline__ void load_window(const ShortConvCudaParams& p, int64_t begin, int64_t at, int slot,
                                            int64_t channel, float (&window)[kTaps - 1][kCount]) {
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    unpack<kType>(
        input_bits<kTaps, typename Bits<kCount>::Word>(p, begin, at - (kTaps - 1) + i, slot, channel),
        window[i]);
  }
}

// The convolution at the input x, whose window moves on.
template <int kTaps, int kCount>
__device__ __forceinline__ void step(const float (&w)[kCount][kTaps], const float (&x)[kCount],
                                     float (&window)[kTaps - 1][kCount], float (&sum)[kCount]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    sum[c] = w[c][0] * window[0][c];
#pragma unroll
    for (int i = 1; i < kTaps - 1; ++i) sum[c] = fmaf(w[c][i], window[i][c], sum[c]);
    sum[c] = fmaf(w[c][kTaps - 1], x[c], sum[c]);
#pragma unroll
    for (int i = 0; i < kTaps - 2; ++i) window[i][c] = window[i + 1][c];
    window[kTaps - 2][c] = x[c];
  }
}

template <int kCount>
__device__ __forceinline__ void apply_silu(float (&y)[kCount]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) y[c] *= sigmoid(y[c]);
}

inline unsigned columns(int64_t channels, int each) {
  return static_cast<unsigned>((channels + kThreads * each - 1) / (kThreads * each));
}

// Tokens of a block: enough blocks to fill a large GPU several times over, else as long as pays.
inline int tokens_per_block(int64_t tokens, unsigned column_count, int most) {
  int block = most;
  while (block > 16 && (tokens + block - 1) / block * column_count < 8 * 132) block /= 2;
  return block;
}

template <class Run>
void dispatch(const ShortConvCudaParams& p, const Run& run) {
  const auto with_type = [&]<CudaType kType>() {
    switch (p.taps) {
      case 2:
        return run.template operator()<kType, 2>();
      case 3:
        return run.template operator()<kType, 3>();
      default:
        return run.template operator()<kType, 4>();
    }
  };
  p.type == CudaType::kBf16 ? with_type.template operator()<CudaType::kBf16>()
                            : with_type.template operator()<CudaType::kF16>();
}

inline void check_rows(const char* name, const void* data, int64_t stride, const ShortConvCudaParams& p) {
  cuda::check_rows("short_conv", name, data, stride, p.channels, p.tokens);
}

}  // namespace kilin::short_conv
