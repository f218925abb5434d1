// SPDX-License-Identifier: Apache-2.0
// First stage of the gradients on Hopper, the forward pass again: from q, k, gate and beta of one chunk and
// value head to its image (kda_backward_sm90.cuh). All chunks are independent. A block of 4 warps per chunk;
// warp I owns the 16 tokens of sub-chunk I.
//
// Every element is handled in the registers of the thread that holds it as an operand of a matrix product:
// the cumulative gate is a product with a triangle of ones, whose result lies where ldmatrix puts q and k; an
// A operand of a matrix is a B operand of its transpose. So the diagonal 16 x 16 blocks of L and P never
// leave the registers.
//
// Decays are split so that no operand overflows and nothing that matters underflows, for any gate:
//   - A decay below 2^-24 per token counts as 2^-24 (the resolution of fp32).
//   - Blocks (I, J) with J < I: rows times 2^(G - start of I), columns times 2^(end of J - G), and what lies
//     between as a factor of the rows; all are at most 1, so fp16 operands, 3 digits better than bf16.
//   - Diagonal blocks, from the sub-chunk's start: kda_pairs_sm90.cuh, gentle or steep.
#pragma once
#include "kernels/kda/kda_backward_decays_sm90.cuh"

namespace kilin::cuda::backward {

// P to its place, zeros above the diagonal of P and A; L: beta and the strict triangle.
template <class Element, int K, class GateElement>
__device__ __forceinline__ void Prepare<Element, K, GateElement>::finish_products() {
  const float zeros[2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j > warp) {
      store_block(Image::kP, j, zeros);
      store_block(Image::kA, j, zeros);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < 3 && j >= warp) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = g + 8 * (i >> 1), column = 8 * n + 2 * t + (i & 1);
        p[j][n][i] = j < 3 || r >= column ? p[j][n][i] * args.scale : 0.0f;
        l[j][n][i] = j < 3 || r > column ? l[j][n][i] * row_beta[i >> 1] : 0.0f;
      }
    }
    store_block(Image::kP, j == 3 ? warp : j, p[j]);
  }
}

// A of the diagonal block by forward substitution, a column per lane (the upper half of the lanes does it
// again).
template <class Element, int K, class GateElement>
__device__ __forceinline__ void Prepare<Element, K, GateElement>::invert_diagonal() {
  float* own = block(warp, warp);
  store_square<Shared::kBlockLd>(own, g, t, l[3]);
  __syncwarp();
  const int column = lane & 15;
  float a[16];
  inverse_column<Shared::kBlockLd>(own, column, a);
  __syncwarp();
  const float beta = floats(Shared::kBeta)[16 * warp + column];
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) own[i * Shared::kBlockLd + column] = a[i];
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t both = pack<Element>(a[i] * beta, 0.0f);
      const uint32_t address =
          base + Image::kA + swizzled<kChunk>(16 * warp + i, 2 * warp + (column >> 3)) + 2 * (column & 7);
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(both)) : "memory");
    }
  }
  __syncthreads();
}

// Blocks of A left of the diagonal, one diagonal after the other: A_IJ = -A_II sum_M L_IM A_MJ.
template <class Element, int K, class GateElement>
__device__ __forceinline__ void Prepare<Element, K, GateElement>::invert_rest() {
#pragma unroll
  for (int distance = 1; distance < 4; ++distance) {
    const int j = warp - distance;
    if (j >= 0) {
      float sum[2][4] = {}, result[2][4] = {}, own[2][4];
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        if (m >= j && m < warp) multiply_block(sum, l[m], block(m, j));
      }
      float* place = block(warp, j);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int offset = (g + 8 * h) * Shared::kBlockLd + 8 * n + 2 * t;
          *reinterpret_cast<float2*>(place + offset) = {-sum[n][2 * h], -sum[n][2 * h + 1]};
          const float2 a = *reinterpret_cast<const float2*>(block(warp, warp) + offset);
          own[n][2 * h] = a.x;
          own[n][2 * h + 1] = a.y;
        }
      }
      __syncwarp();
      multiply_block(result, own, place);
      __syncwarp();
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 beta = *reinterpret_cast<const float2*>(floats(Shared::kBeta) + 16 * j + 8 * n + 2 * t);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          *reinterpret_cast<float2*>(place + (g + 8 * h) * Shared::kBlockLd + 8 * n + 2 * t) = {
              result[n][2 * h], result[n][2 * h + 1]};
          result[n][2 * h] *= beta.x;
          result[n][2 * h + 1] *= beta.y;
        }
      }
      store_block(Image::kA, j, result);
    }
    if (distance < 3) __syncthreads();
  }
  __syncwarp();
}

// -A diag(beta) (k 2^G), in the place of k 2^G.
template <class Element, int K, class GateElement>
__device__ __forceinline__ void Prepare<Element, K, GateElement>::product_w() {
  float w[2 * kSteps][4];  // minus w
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) w[i][0] = w[i][1] = w[i][2] = w[i][3] = 0.0f;
#pragma unroll 1
  for (int j = 0; j <= warp; ++j) {
    uint32_t a[4];
    ldmatrix(a, block_address(Image::kA, warp, j));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= 0x80008000u;  // both signs
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ldmatrix_trans(b, block_address(Image::kMinusW, j, step));
      mma<Element>(w[2 * step], a, b[0], b[1]);
      mma<Element>(w[2 * step + 1], a, b[2], b[3]);
    }
  }
  __syncthreads();  // all have read k 2^G
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t packed[4];
    pack_operand<Element>(&w[2 * step][0], packed);
    stmatrix(block_address(Image::kMinusW, warp, step), packed);
  }
}

template <class Element, int K, class GateElement>
__global__ void __launch_bounds__(128, 2) kda_prepare(const __grid_constant__ KdaPrepareArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int head = blockIdx.x % args.value_heads;
  const int64_t chunk = blockIdx.x / args.value_heads;
  int64_t first;
  int length;
  if (!locate_chunk<kChunk>(args.layout, chunk, first, length)) return;
  const int lane = threadIdx.x & 31;
  Prepare<Element, K, GateElement> prepare{.args = args,
                                           .shared = shared,
                                           .base = shared_address(shared),
                                           .head = head,
                                           .length = length,
                                           .first = first,
                                           .warp = static_cast<int>(threadIdx.x >> 5),
                                           .lane = lane,
                                           .g = lane >> 2,
                                           .t = lane & 3};
  prepare.load();
  prepare.diagonal();
  __syncthreads();
  prepare.factors();
  prepare.off_diagonal();
  prepare.finish_products();
  prepare.invert_diagonal();
  prepare.invert_rest();
  prepare.product_w();
  async_proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    using Image = KdaImage<K>;
    bulk_store(args.images + static_cast<int64_t>(blockIdx.x) * Image::kBytes, shared_address(shared),
               Image::kBytes);
    bulk_commit();
    bulk_wait_read();
  }
}

}  // namespace kilin::cuda::backward
