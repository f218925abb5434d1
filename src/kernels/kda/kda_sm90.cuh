// SPDX-License-Identifier: Apache-2.0
// What the chunk kernels for Hopper share: arguments, the image of a chunk, addresses in shared memory.
//
// A chunk has C = 16 tokens. Per chunk and value head there is one image in shared memory (docs/math/kda.md,
// chunked form; G = cumulative log2 decay from the chunk's start, G_C at its end). k^ is a key times a power
// of two, of length 1/2 to 1, k = f k^ the normalised one, c = beta f, L_ij = f_i k^_i . (c_j k^_j 2^(G_i -
// G_j)) for i > j, A = (I + L)^-1:
//     rows      minus w = -diag(c) A diag(f) (k^ 2^G), then q = scale q 2^G   [2 C][K]
//     keys      k^ 2^(G_C - G)                                                [C][K]
//     P         scale q_i . k^_j 2^(G_i - G_j), i >= j, else 0                [C][C]
//     A                                                                       [C][C]
//     decay     2^G_C, of every 16 channels 0 1 8 9, 2 3 10 11, 4 5 ...       [K], fp32
//     factor    c                                                             [C], fp32
// Rows and keys are in the 128-byte swizzle, [K / 64][rows][64 columns]: the 16-byte piece p of row r stands
// at place p ^ (r % 8) of the row. P and A are in cores of 8 rows of 16 bytes, [2 row blocks][2 column
// blocks][8][8]. Before a warp makes the image (kda_image_sm90.cuh), the raw gate lies in the place of minus
// w, raw q in that of q, raw k in that of the keys, the bias in that of the decay.
#pragma once
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/kda/kda_cuda.h"
#include "kernels/kda/kda_layout_sm90.cuh"

namespace kilin::cuda {

constexpr int kChunk = 16;

template <int K>
struct KdaImage {
  static constexpr int kRows = 0;
  static constexpr int kKeys = 2 * kChunk * K * 2;
  static constexpr int kP = kKeys + kChunk * K * 2;
  static constexpr int kA = kP + kChunk * kChunk * 2;
  static constexpr int kDecay = kA + kChunk * kChunk * 2;
  static constexpr int kFactor = kDecay + K * 4;
  static constexpr int kBytes = kFactor + kChunk * 4;
  static constexpr int kPlace = (kBytes + 1023) / 1024 * 1024;  // in shared memory
  static_assert(kBytes + kChunk * 4 <= kPlace);                 // room for what making an image needs
};

struct KdaArgs {
  KdaLayout layout;
  const void* q;
  const void* k;
  const void* v;
  const void* gate;
  const void* beta;
  void* out;
  int64_t q_stride, k_stride, v_stride, gate_stride, beta_stride, out_stride;
  const float* a_log;
  const float* dt_bias;
  int heads, value_heads, value_dim;
  CudaType beta_type;
  bool l2norm, beta_is_logit;
  float beta_scale, lower_bound, scale;
  uint8_t* images;   // [chunks][HV]
  int segments;      // that the scan cuts a sequence into
  float* summaries;  // [N][HV][segments - 1][V + K][K]: what a segment makes of nothing, and of the identity
  float* starts;     // [N][HV][segments][V][K]: the state before each segment
  CudaStates initial, final;
  void* chunk_states;
  CudaType chunk_state_type;
};

// Element [row][column] of a matrix whose rows lie `stride` elements apart. Rows and strides are in 32 bits
// (validate() in kda_cuda.cc), so that this is one multiplication.
template <class T>
__device__ __forceinline__ const T* row_address(const T* matrix, int row, int64_t stride, int column = 0) {
  return matrix + static_cast<uint64_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(stride) + column;
}

}  // namespace kilin::cuda
