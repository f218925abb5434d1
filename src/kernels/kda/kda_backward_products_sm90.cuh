// SPDX-License-Identifier: Apache-2.0
// Gradients of a chunk (kda_backward_gradient_sm90.cuh): products of 64 x 64 and larger.
#pragma once
#include "kernels/kda/kda_backward_block_sm90.cuh"

namespace kilin::cuda::backward {

// dv = A^T dU of this warp's rows, fp32 and as A operands
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::make_dv(
    float (&dv)[V / 2], uint32_t (&packed)[V / 16][4]) const {
  uint32_t a[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 16 * i + (lane & 7) + 8 * (lane >> 4);
    ldmatrix_trans(a[i], base + Shared::kA + swizzled<kChunk>(token, 2 * (warp & 3) + ((lane >> 3) & 1)));
  }
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) wgmma<Element, 1>(dv, a[i], columns_of(Shared::kDU, 8192) + i * 128, i > 0);
  finish();
  pack_rows<V / 8>(dv, packed);
}

// dv on its way out, and v . dv of each row.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::value_gradients(
    const float (&dv)[V / 2], const uint32_t (&packed)[V / 16][4]) const {
  float sum[2] = {0.0f, 0.0f};
  Element* to =
      static_cast<Element*>(args.d_v) + first * args.d_v_stride + static_cast<int64_t>(head) * V + 2 * t;
#pragma unroll
  for (int i = 0; i < V / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 2 * i + (j >> 1), h = j & 1;
      const float2 v = unpack<Element>(
          *reinterpret_cast<const uint32_t*>(shared + Shared::kV + swizzled<kChunk>(row(h), n) + 4 * t));
      sum[h] = fmaf(v.x, dv[8 * i + 2 * j], fmaf(v.y, dv[8 * i + 2 * j + 1], sum[h]));
      if (args.d_v != nullptr && row(h) < length)
        *reinterpret_cast<uint32_t*>(to + row(h) * args.d_v_stride + 8 * n) = packed[i][j];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = lane_sum<4>(sum[h]);
    if (t == 0) floats(Shared::kValueSums)[row(h)] = sum[h];
  }
}

// The products, shared among the warpgroups: dP, d(q D) | d(q D), dkt | dv, dM, d(k D) | dv again, d(k D),
// dkt. With K = 64 the halves of 64 channels are all there is.
template <class Element, int K, int V, class GateElement>
__device__ __forceinline__ void Gradient<Element, K, V, GateElement>::products() const {
  constexpr bool kHalves = K == 128;
  const int group = warp >> 2;
  float x[32], y[32];
  uint32_t a[V / 16][4];
  if (group == 0) {
    load_rows(Shared::kDOut, a);
    wgmma_fence();
    times_u(x, a);
    times_state(y, a, Shared::kState, 0);
    finish();
    operands_read();
    store_pairs(Shared::kDP, x, 1.0f, 0);
    store_half(Shared::kDQ, y, 1.0f, 0);
  } else if (group == 1) {
    if constexpr (kHalves) {
      load_rows(Shared::kDOut, a);
      wgmma_fence();
      times_state(x, a, Shared::kState, 1);
      finish();
    }
    load_rows(Shared::kU, a);
    wgmma_fence();
    times_state(y, a, Shared::kDState, 0);
    finish();
    operands_read();
    if constexpr (kHalves) store_half(Shared::kDQ, x, 1.0f, 1);
    store_half(Shared::kBack, y, 1.0f, 0);
  } else if (group == 2) {
    {
      float dv[V / 2];
      make_dv(dv, a);
      value_gradients(dv, a);
    }
    wgmma_fence();
    times_u(x, a);
    times_state(y, a, Shared::kState, 0);
    finish();
    operands_read();
    store_pairs(Shared::kDM, x, -1.0f, 1);
    store_half(Shared::kDK, y, -1.0f, 0);
  } else {
    if constexpr (kHalves) {
      {
        float dv[V / 2];
        make_dv(dv, a);
      }
      wgmma_fence();
      times_state(x, a, Shared::kState, 1);
      finish();
      load_rows(Shared::kU, a);
      wgmma_fence();
      times_state(y, a, Shared::kDState, 1);
      finish();
    }
    operands_read();
    if constexpr (kHalves) {
      store_half(Shared::kDK, x, -1.0f, 1);
      store_half(Shared::kBack, y, 1.0f, 1);
    }
  }
}

}  // namespace kilin::cuda::backward
