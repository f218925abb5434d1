// SPDX-License-Identifier: Apache-2.0
// The short convolution of conv/short_conv.h on Hopper GPUs: forward over packed sequences, one-token update,
// backward.
//   y_t[c] = silu(sum_{i < taps} w[c][i] u_{t - taps + 1 + i}[c])
// Activations are bfloat16 or float16, arithmetic is float32. Weights are [channels][taps] as the checkpoint
// has them
// ([channels][1][taps], also FLA's). No call allocates or synchronises. Results are the same bits every time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/types.h"

namespace kilin {

// The last taps - 1 inputs of every sequence, oldest first: slot s at data + s * slot_stride, [taps -
// 1][channels], in the type of u.
struct ConvStates {
  void* data = nullptr;
  int64_t slot_stride = 0;  // elements, a multiple of 8
  const int32_t* slots =
      nullptr;  // [N] on the device; null: slot n. A negative slot reads as zeros, is not written
};

struct ShortConvCudaParams {
  int64_t channels = 0;  // a multiple of 8
  int taps = 4;          // 2, 3 or 4
  int sequences = 0;     // N
  int64_t tokens = 0;    // T of all sequences together
  // [N + 1] token offsets on the device; null: T / N tokens each. wide_seqlens: int64 instead of int32.
  const void* cu_seqlens = nullptr;
  bool wide_seqlens = false;
  CudaType type = CudaType::kBf16;  // of u, y, the states and the gradients: kBf16 or kF16
  CudaTokens u;                     // [T][channels]; like all rows here aligned to 16 bytes
  const void* weight = nullptr;     // [channels][taps]
  CudaType weight_type = CudaType::kBf16;
  bool silu = true;
  ConvStates initial;  // data null: zeros
  ConvStates final;    // data null: not written; may be the pool of `initial`
  void* y = nullptr;   // [T][channels]; not u
  int64_t y_stride = 0;
};

// Throws Error when a dimension, a type, a pointer or a stride does not fit.
void validate(const ShortConvCudaParams& params);

// Any lengths. A sequence without tokens has its initial state copied to its final slot.
void short_conv_cuda(const ShortConvCudaParams& params, CUstream_st* stream);

// One token per sequence (T = N), with `initial` and `final` one pool that is updated in place; faster than
// the above.
void short_conv_update_cuda(const ShortConvCudaParams& params, CUstream_st* stream);

// Gradients. `forward.y` and `forward.final` are not used, `initial` as it was before the forward pass (so
// not the pool that it updated in place).
struct ShortConvCudaBackward {
  ShortConvCudaParams forward;
  CudaTokens dy;       // [T][channels]
  ConvStates d_final;  // gradient of the final states; data null: zeros
  void* du = nullptr;  // [T][channels]
  int64_t du_stride = 0;
  float* d_weight = nullptr;  // [channels][taps], overwritten
  ConvStates d_initial;       // data null: not wanted
};

// Bytes of workspace (aligned to 16).
size_t short_conv_backward_cuda_workspace(const ShortConvCudaBackward& params);
void short_conv_backward_cuda(const ShortConvCudaBackward& params, void* workspace, size_t workspace_bytes,
                              CUstream_st* stream);

}  // namespace kilin
