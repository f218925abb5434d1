// SPDX-License-Identifier: Apache-2.0
// Kimi Delta Attention on Hopper GPUs (sm_90a), without a framework: pointers, strides, a stream, and a
// workspace that the caller owns. No call allocates, synchronises or reads device memory on the host, so all
// of them may be captured in a CUDA graph.
//
// The mathematics, the transforms of gate, beta, q and k, and the meaning of heads and value heads are those
// of kda.h. Layouts here:
//     q, k   [T][H][K]    v, out [T][HV][V]    gate [T][HV][K]    beta [T][HV]
// with a stride in elements from one token to the next (a slice of a packed projection is fine); within a
// token the values are contiguous. The state is [slot][HV][V][K].
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/types.h"
#include "kernels/kda/kda.h"

namespace kilin {

enum class KdaCudaPlan : uint8_t { kAuto, kFused, kTwoKernels, kSegments, kPipe };

struct KdaCudaParams {
  int heads = 0;        // H
  int value_heads = 0;  // HV, a multiple of H
  int key_dim = 0;      // K: 64 or 128
  int value_dim = 0;    // V: 64 or 128
  int sequences = 0;    // N
  int64_t tokens = 0;   // T of all sequences together
  // [N + 1] token offsets on the device, rising from 0 to T; sequences may be empty. Null: N sequences of
  // T / N tokens each. wide_seqlens: they are int64 instead of int32.
  const void* cu_seqlens = nullptr;
  bool wide_seqlens = false;

  CudaType type = CudaType::kBf16;  // of q, k, v and out: kBf16 or kF16
  CudaTokens q, k, v;
  CudaTokens gate;
  CudaType gate_type = CudaType::kBf16;  // kBf16, kF16 or kF32
  CudaTokens beta;
  CudaType beta_type = CudaType::kBf16;  // kBf16, kF16 or kF32
  KdaGate gate_kind = KdaGate::kSoftplus;
  float lower_bound = -5.0f;       // kBounded only
  const float* a_log = nullptr;    // [HV] on the device; null means zeros
  const float* dt_bias = nullptr;  // [HV * K] on the device; null means zeros
  bool l2norm = true;
  bool beta_is_logit = false;
  float beta_scale = 1.0f;  // 2 allows negative eigenvalues: beta = 2 sigmoid(x)
  float scale = 1.0f;

  CudaStates initial;  // data null: zeros
  CudaStates final;    // data null: not written; may be the same pool as initial
  // Optional: the state before every chunk of kKdaCudaChunk tokens, [chunks][HV][V][K] in chunk_state_type,
  // the chunks of sequence 0 first, then those of sequence 1 ...
  void* chunk_states = nullptr;
  CudaType chunk_state_type = CudaType::kBf16;

  void* out = nullptr;
  int64_t out_stride = 0;

  // How: both kernels in one block per sequence and head (nothing goes through memory between them); or one
  // kernel for all chunks in parallel and one for the scan; or the latter with each sequence cut into
  // segments, which are scanned side by side (docs/math/kda.md); or one cooperative launch with blocks for
  // chunks and blocks for the scan, side by side, which needs fewer than one block of 64 rows of the states
  // per multiprocessor. kAuto takes what was measured to be faster, and of plans that fit.
  KdaCudaPlan plan = KdaCudaPlan::kAuto;
  // That the plan counts on, as the workspace is asked for and as it is used. 0: those of the current context
  // (cuda_device()), which should be that of the stream; for a stream of a green context that is not current,
  // the green context's.
  int multiprocessors = 0;
};

// Tokens between two chunk states.
inline constexpr int kKdaCudaChunk = 64;

// Throws Error when a dimension, a type, a pointer or a stride does not fit (what is on the device is not
// read).
void validate(const KdaCudaParams& params);
void validate_recurrent(const KdaCudaParams& params);  // for kda_recurrent_cuda
// Of states, or of their gradients, that belong to the arguments.
void validate_states(const CudaStates& states, const char* name, const KdaCudaParams& params);

// Which plan that is: params.plan, or what kAuto takes.
KdaCudaPlan kda_chunk_cuda_plan(const KdaCudaParams& params);

// Bytes of workspace that kda_chunk_cuda needs (256-byte aligned).
size_t kda_chunk_cuda_workspace(const KdaCudaParams& params);

// The chunked form. Throws Error when the arguments or the workspace do not fit, or when a launch fails.
void kda_chunk_cuda(const KdaCudaParams& params, void* workspace, size_t workspace_bytes,
                    CUstream_st* stream);

}  // namespace kilin
