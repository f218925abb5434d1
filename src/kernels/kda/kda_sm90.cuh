// SPDX-License-Identifier: Apache-2.0
// What the chunk kernels for Hopper share: arguments, the image of a chunk, addresses in shared memory.
//
// A chunk has C = 64 tokens. Per chunk and value head, kda_prepare writes one image, which kda_scan copies into
// shared memory as it is (docs/math/kda.md, chunked form; G = cumulative log2 decay from the chunk's start, G_C at its
// end, L_ij = beta_i k_i . (k_j 2^(G_i - G_j)) for i > j, A = (I + L)^-1):
//     minus w   -A diag(beta) (k 2^G)        [C][K]
//     q         scale q 2^G                  [C][K]
//     k         k 2^(G_C - G)                [C][K]
//     P         scale q_i . k_j 2^(G_i - G_j), i >= j, else 0   [C][C]
//     A         A diag(beta)                 [C][C]
//     decay     2^G_C                        [K], fp32
// The matrices are in the 128-byte swizzle, [K / 64][64 rows][64 columns]: the 16-byte piece p of row r stands at
// piece p ^ (r % 8) of the row.
#pragma once
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/kda/kda_cuda.h"

namespace kilin::cuda {

constexpr int kChunk = kKdaCudaChunk;

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

// Where a chunk or a sequence lies. offsets and chunks are null when all sequences are `length` tokens long.
struct KdaLayout {
  int sequences;
  int64_t length;           // of every sequence, or 0
  int chunks_per_sequence;  // with length
  const int32_t* offsets;   // [N + 1] first chunk of each sequence
  const int64_t* starts;    // [N + 1] first token of each sequence
  const int64_t* chunks;    // [chunks] first token and, in the top 8 bits, the number of tokens less one
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

struct KdaScanArgs {
  KdaLayout layout;
  const uint8_t* images;
  const void* v;
  int64_t v_stride;
  void* out;
  int64_t out_stride;
  int value_heads, value_dim;
  CudaStates initial, final;
  void* chunk_states;
  CudaType chunk_state_type;
};

// Byte offset of the 16-byte piece `piece` (8 elements) of row `row` in a swizzled [.][64][64] matrix.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return (piece >> 3) * 8192 + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ float load_float(const void* p, CudaType type, int64_t i) {
  if (type == CudaType::kF32) return static_cast<const float*>(p)[i];
  if (type == CudaType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

}  // namespace kilin::cuda
