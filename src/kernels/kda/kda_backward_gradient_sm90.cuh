// SPDX-License-Identifier: Apache-2.0
// Last stage of the gradients on Hopper: everything of one chunk and value head, given the state S before it,
// the gradient H of the state after it, U and dU. All chunks are independent; a block of four warpgroups
// each. The steps and their formulas are those of kda_backward_stages_test.cc:
//     dP = tril(dO U^T)     d(q D) = dO S     dkt = U H
//     dv = A^T dU           dM = -stril(dv U^T)     d(k D) = -dv S
// (A with beta in its columns, as in the image) as products of warpgroups with fp32 sums. Then pairs of
// tokens: in different sub-chunks of 16 as tf32 products, relative to the start of the row's or the end of
// the column's sub-chunk, so that no exponent is positive; in the same sub-chunk one thread per channel,
// which multiplies by decays only. Then gate, norms and sigmoid. 16 warps, since all but the products waits
// for latencies.
#pragma once
#include "kernels/kda/kda_backward_gates_sm90.cuh"
#include "kernels/kda/kda_backward_pairs_sm90.cuh"
#include "kernels/kda/kda_backward_products_sm90.cuh"

namespace kilin::cuda::backward {

template <class Element, int K, int V, class GateElement>
__global__ void __launch_bounds__(512, 1) kda_gradient(const __grid_constant__ KdaGradientArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int head = blockIdx.x % args.inputs.value_heads;
  const int64_t chunk = blockIdx.x / args.inputs.value_heads;
  int64_t first;
  int length;
  if (!locate_chunk<kChunk>(args.layout, chunk, first, length)) return;
  const int lane = threadIdx.x & 31;
  const Gradient<Element, K, V, GateElement> gradient{
      .args = args,
      .shared = shared,
      .base = shared_address(shared),
      .chunk = chunk,
      .first = first,
      .head = head,
      .length = length,
      .thread = static_cast<int>(threadIdx.x),
      .warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0),
      .lane = lane,
      .g = lane >> 2,
      .t = lane & 3};
  gradient.load();
  gradient.norms_and_state_sums();
  gradient.products();
  __syncthreads();
  gradient.cumulative_gates();
  __syncthreads();
  gradient.pairs_between();
  __syncthreads();
  gradient.pairs_within();
  __syncthreads();
  gradient.gate_gradients();
  gradient.row_gradients();
  __syncthreads();
  gradient.store_sums();
}

}  // namespace kilin::cuda::backward
