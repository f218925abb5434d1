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
#include "kernels/kda/kda_backward_cuda.h"

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

// Where a chunk or a sequence lies. offsets and chunks are null when all sequences are `length` tokens long.
struct KdaLayout {
  int sequences = 0;
  int64_t length = 0;                // of every sequence, or 0
  int chunks_per_sequence = 0;       // with length
  const int32_t* offsets = nullptr;  // [N + 1] first chunk of each sequence
  const int64_t* starts = nullptr;   // [N + 1] first token of each sequence
  const int64_t* chunks =
      nullptr;  // [chunks] first token and, in the top 8 bits, the number of tokens less one
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

// Byte offset of the 16-byte piece `piece` (8 elements) of row `row` in a swizzled [.][64][64] matrix.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return (piece >> 3) * 8192 + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ float load_float(const void* p, CudaType type, int64_t i) {
  if (type == CudaType::kF32) return static_cast<const float*>(p)[i];
  if (type == CudaType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

__device__ __forceinline__ void store_float(void* p, CudaType type, int64_t i, float x) {
  if (type == CudaType::kF32) static_cast<float*>(p)[i] = x;
  if (type == CudaType::kBf16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  if (type == CudaType::kF16) static_cast<__half*>(p)[i] = __float2half_rn(x);
}

// The sequence of this block.
struct ChunkSequence {
  int64_t first;  // token
  int64_t length;
  int64_t chunk;  // first chunk
  int chunks;
};

__device__ __forceinline__ ChunkSequence chunk_sequence(const KdaLayout& layout, int n) {
  if (layout.offsets == nullptr) {
    return {n * layout.length, layout.length, static_cast<int64_t>(n) * layout.chunks_per_sequence,
            layout.chunks_per_sequence};
  }
  const int64_t first = layout.starts[n];
  return {first, layout.starts[n + 1] - first, layout.offsets[n], layout.offsets[n + 1] - layout.offsets[n]};
}

// The first token of a chunk and the number of its tokens; false for a block beyond the last chunk.
__device__ __forceinline__ bool locate_chunk(const KdaLayout& layout, int64_t chunk, int64_t& first,
                                             int& length) {
  if (layout.chunks == nullptr) {
    const int number = static_cast<int>(chunk);  // a division of 64 bits costs a hundred instructions
    const int sequence = number / layout.chunks_per_sequence;
    const int64_t offset = static_cast<int64_t>(number % layout.chunks_per_sequence) * kChunk;
    first = sequence * layout.length + offset;
    length = static_cast<int>(min(static_cast<int64_t>(kChunk), layout.length - offset));
    return true;
  }
  if (chunk >= layout.offsets[layout.sequences]) return false;
  const int64_t entry = layout.chunks[chunk];
  first = entry & ((int64_t{1} << 56) - 1);
  length = static_cast<int>(entry >> 56) + 1;
  return true;
}

}  // namespace kilin::cuda::backward
