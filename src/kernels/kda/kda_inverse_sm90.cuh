// SPDX-License-Identifier: Apache-2.0
// (I + L)^-1 of a 16 x 16 block by forward substitution, by one warp, a column per lane.
#pragma once
#include <cstdint>

namespace kilin::cuda {

// A 16 x 16 matrix in accumulator layout to shared memory, rows kLd floats apart.
template <int kLd>
__device__ __forceinline__ void store_square(float* to, int g, int t, const float (&x)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(to + (g + 8 * h) * kLd + 8 * n + 2 * t) = {x[n][2 * h], x[n][2 * h + 1]};
  }
}

// Column `column` of (I + L)^-1, L the strict lower triangle of a matrix in shared memory.
template <int kLd>
__device__ __forceinline__ void inverse_column(const float* l, int column, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float even = i == column ? 1.0f : 0.0f, odd = 0.0f;
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 row = *reinterpret_cast<const float4*>(l + i * kLd + j);
      even = fmaf(-row.x, x[j], even);
      if (j + 1 < i) odd = fmaf(-row.y, x[j + 1], odd);
      if (j + 2 < i) even = fmaf(-row.z, x[j + 2], even);
      if (j + 3 < i) odd = fmaf(-row.w, x[j + 3], odd);
    }
    x[i] = even + odd;
  }
}

}  // namespace kilin::cuda
