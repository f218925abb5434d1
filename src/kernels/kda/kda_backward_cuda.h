// SPDX-License-Identifier: Apache-2.0
// Gradients of Kimi Delta Attention on Hopper GPUs (sm_90a), in the manner of kda_cuda.h: pointers, strides,
// a stream, a workspace of the caller; no call allocates, synchronises or reads device memory on the host. No
// atomics: the same inputs give the same bits.
//
// The forward pass is computed again, so that nothing but its inputs has to be kept. Without atomics the sums
// of d_a_log and d_dt_bias go through the workspace.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kda/kda_cuda.h"

namespace kilin {

// A gradient that is written: elements of the type of the tensor it belongs to. Null: not wanted.
struct CudaGradient {
  void* data = nullptr;
  int64_t stride = 0;  // elements from one token to the next
};

struct KdaBackwardCudaParams {
  // The arguments of the forward pass; initial is read, final, chunk_states and out are not used. key_dim and
  // value_dim are both 64 or both 128.
  KdaCudaParams forward;
  CudaTokens d_out;          // [T][HV][V], of forward.type
  CudaStates d_final;        // gradient of the final states; data null: zeros
  CudaStates d_initial;      // of the initial states; data null: not written; may be the same pool as d_final
  CudaGradient d_q, d_k;     // [T][H][K], of forward.type
  CudaGradient d_v;          // [T][HV][V], of forward.type
  CudaGradient d_gate;       // [T][HV][K], of forward.gate_type: of the raw gate
  CudaGradient d_beta;       // [T][HV], of forward.beta_type: of what was passed as beta
  float* d_a_log = nullptr;  // [HV]; null: not wanted, and with kNone
  float* d_dt_bias = nullptr;  // [HV * K]; likewise
};

// Throws Error when an argument does not fit.
void validate(const KdaBackwardCudaParams& params);

// Bytes of workspace (256-byte aligned): per 64 tokens and value head of 128 x 128 about 165 KB.
size_t kda_backward_cuda_workspace(const KdaBackwardCudaParams& params);

// Throws Error when the arguments or the workspace do not fit, or when a launch fails.
void kda_backward_cuda(const KdaBackwardCudaParams& params, void* workspace, size_t workspace_bytes,
                       CUstream_st* stream);

}  // namespace kilin
