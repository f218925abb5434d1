// SPDX-License-Identifier: Apache-2.0
// What the gradient kernels for Hopper share: their arguments, the image of a chunk, addresses in shared
// memory. The stages are described in docs/notes/20261124-cuda-backward.md; the same steps in plain loops
// stand in kda_backward_stages_test.cc.
//
// A chunk has C = 64 tokens. Per chunk and value head, prepare() writes one image, which the scans copy into
// shared memory as it is (docs/math/kda.md, chunked form; G = cumulative log2 decay from the chunk's start,
// G_C at its end, L_ij = beta_i k_i . (k_j 2^(G_i - G_j)) for i > j, A = (I + L)^-1):
//     minus w   -A diag(beta) (k 2^G)        [C][K]
//     q         scale q 2^G                  [C][K]
//     k         k 2^(G_C - G)                [C][K]
//     P         scale q_i . k_j 2^(G_i - G_j), i >= j, else 0   [C][C]
//     A         A diag(beta)                 [C][C]
//     decay     2^G_C                        [K], fp32
// The matrices are in the 128-byte swizzle, [K / 64][64 rows][64 columns]: the 16-byte piece p of row r
// stands at piece p ^ (r % 8) of the row.
#pragma once
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/scalar.cuh"
#include "kernels/kda/kda_backward_cuda.h"
#include "kernels/kda/kda_layout_sm90.cuh"

namespace kilin::cuda::backward {

constexpr int kChunk = 64;

template <int K>
struct KdaImage {
  static constexpr int kTile = kChunk * K * 2;  // bytes of a [C][K] matrix
  static constexpr int kSquare = kChunk * kChunk * 2;
  static constexpr int kMinusW = 0;
  static constexpr int kQ = kTile;
  static constexpr int kK = 2 * kTile;
  static constexpr int kP = 3 * kTile;
  static constexpr int kA = kP + kSquare;
  static constexpr int kDecay = kA + kSquare;
  static constexpr int kBytes = kDecay + K * 4;
};

struct KdaPrepareArgs {
  KdaLayout layout;
  const void* q;
  const void* k;
  const void* gate;
  const void* beta;
  int64_t q_stride, k_stride, gate_stride, beta_stride;
  const float* a_log;
  const float* dt_bias;
  int heads, value_heads;
  KdaGate gate_kind;
  CudaType beta_type;
  bool l2norm, beta_is_logit;
  float beta_scale, lower_bound, scale;
  uint8_t* images;  // [chunks][HV]
};

// Gradients of one chunk, all chunks at once.
struct KdaGradientArgs {
  KdaLayout layout;
  KdaPrepareArgs inputs;
  const uint8_t* states;    // before each chunk: [chunks][HV] images [K / 64][V][64] in the 128-byte swizzle
  const uint8_t* d_states;  // gradients after each chunk
  const uint8_t* u;         // [chunks][HV] images [V / 64][64][64] in the 128-byte swizzle
  const uint8_t* d_u;
  const void* v;
  const void* d_out;
  int64_t v_stride, d_out_stride;
  void* d_q;  // elements [T][H * K], or with several value heads per head fp32 [T][HV * K]
  void* d_k;
  void* d_v;
  void* d_gate;
  void* d_beta;
  CudaType d_beta_type;  // of d_beta; that of beta is the one in inputs
  int64_t d_q_stride, d_k_stride, d_v_stride, d_gate_stride, d_beta_stride;
  bool wide_keys;  // d_q and d_k are the fp32 ones
  float* sums;     // [chunks][HV][1 + K]: d_a_log, d_dt_bias
};

// A head's e^a_log; 1 without it.
__device__ __forceinline__ float gate_speed(const KdaPrepareArgs& args, int head) {
  return args.a_log != nullptr && args.gate_kind != KdaGate::kNone ? __expf(args.a_log[head]) : 1.0f;
}

// Begins the copies (cp.async, not committed) of the rows of a chunk, kPieces times 16 bytes each and
// `stride` elements apart, to place(row, piece); zeros for rows from `length` on. Called by kThreads threads.
template <int kThreads, int kPieces, class Element, class Place>
__device__ __forceinline__ void copy_rows(const Element* rows, int64_t stride, int length, Place place) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kThreads) {
    const int r = i / kPieces, piece = i % kPieces;
    copy_16_async(place(r, piece), rows + (r < length ? r * stride : 0) + piece * 8, r < length);
  }
}

}  // namespace kilin::cuda::backward
