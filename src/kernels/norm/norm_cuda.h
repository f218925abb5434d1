// SPDX-License-Identifier: Apache-2.0
// The gated RMSNorm of norm/norm.h on Hopper GPUs, forward and backward:
//   y = w * x * r * act(z),  r = 1 / sqrt(mean x^2 + eps), per row (token and head) of `width` values.
// Activations are bfloat16 or float16, arithmetic is float32. No call allocates or synchronises. Results are
// the same bits every time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/types.h"
#include "kernels/norm/norm.h"

namespace kilin {

struct GatedNormCudaParams {
  int64_t tokens = 0;
  int heads = 1;
  int width = 128;                  // 64, 128 or 256
  CudaType type = CudaType::kBf16;  // of x, z, y and the gradients: kBf16 or kF16
  CudaTokens x;                     // [tokens][heads][width]; like all rows here aligned to 16 bytes
  CudaTokens z;                     // the same; not read with kNone
  const void* weight = nullptr;     // [width]; null: ones
  CudaType weight_type = CudaType::kBf16;
  float eps = 1e-5f;
  GateActivation activation = GateActivation::kSigmoid;
  void* y = nullptr;  // [tokens][heads][width]; may be x or z
  int64_t y_stride = 0;
};

void validate(const GatedNormCudaParams& params);
void gated_rms_norm_cuda(const GatedNormCudaParams& params, CUstream_st* stream);

// With h = dy * act(z) * w and n = x r:
//   dx = r (h - n mean(h n)),  dz = dy * w * n * act'(z),  d_weight = sum over rows of dy * act(z) * n.
struct GatedNormCudaBackward {
  GatedNormCudaParams forward;  // y is not used
  CudaTokens dy;
  void* dx = nullptr;
  int64_t dx_stride = 0;
  void* dz = nullptr;  // not written with kNone
  int64_t dz_stride = 0;
  float* d_weight = nullptr;  // [width], overwritten; null: not wanted
};

size_t gated_rms_norm_backward_cuda_workspace(const GatedNormCudaBackward& params);
void gated_rms_norm_backward_cuda(const GatedNormCudaBackward& params, void* workspace,
                                  size_t workspace_bytes, CUstream_st* stream);

}  // namespace kilin
