// SPDX-License-Identifier: Apache-2.0
// Images and scan in one block per sequence, value head and part of V: nothing but q, k, v, gate and out goes
// through memory. The scan (kda_scan_sm90.cuh has the formulas) is done by one or two warpgroups of 64 rows
// of S each, with warpgroup products, which read an operand in shared memory once for all four warps; the
// other warps make the images ahead, chunk c by warp c % kMakers.
#pragma once
#include "kernels/cuda/wgmma.cuh"
#include "kernels/kda/kda_state_sm90.cuh"

namespace kilin::cuda {

template <int kGroups>
constexpr int kMakers = kGroups == 2 ? 8 : 12;

template <class Element, int K>
__device__ __forceinline__ void scan_chunk(StateRows<Element, K>& state, OutRows<Element>& out, int c,
                                           uint32_t place, uint32_t values, int part, uint32_t full,
                                           uint32_t parity) {
  using Image = KdaImage<K>;
  constexpr int kSteps = K / 16;
  state.store_chunk_state(c);
  uint32_t rounded[kSteps][4];
  state.round(rounded);
  barrier_wait(full, parity);
  uint32_t v[4];
  ldmatrix_trans(v, values_block(values, part));
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    state.decay(i, load_shared_floats(place + Image::kDecay + state.t * 16 + 64 * i));
  const float2 factor[2] = {load_shared_pair(place + Image::kFactor + state.t * 8),
                            load_shared_pair(place + Image::kFactor + state.t * 8 + 32)};
  float x[16];  // [0 to 7] S (minus w)^T, [8 to 15] S q^T
  float y[8];   // v^T A^T, then R P^T
  const uint64_t rows = swizzled_matrix(place + Image::kRows, 16, 1024);
  wgmma_fence();
  wgmma<Element, 0>(y, v, plain_matrix(place + Image::kA, 128, 256), false);
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    wgmma<Element, 0>(x, rounded[i], rows + (i / 4) * 256 + (i % 4) * 2, i > 0);
  wgmma_commit();
  wgmma_wait<0>();
  uint32_t written[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    written[i] = pack<Element>(fmaf(y[2 * i], factor[i >> 1].x, x[2 * i]),
                               fmaf(y[2 * i + 1], factor[i >> 1].y, x[2 * i + 1]));
  }
  wgmma_fence();
  wgmma<Element, 1>(state.s, written, swizzled_matrix(place + Image::kKeys, 2048, 1024), true);
  wgmma<Element, 0>(y, written, plain_matrix(place + Image::kP, 128, 256), false);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] += x[8 + i];
  out.put_transposed(y, values, part);
  barrier_arrive(full + 8);
}

template <class Element, int K, class GateElement, KdaGate kGate, int kGroups>
__global__ void __launch_bounds__(512, 1) kda_fused(const __grid_constant__ KdaArgs args) {
  using Shared = ScanShared<K, kGroups * 64, 12>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  init_stages<Shared::kStages>(base + Shared::kBarriers, 32, 128 * kGroups);
  const ScanWork work = scan_work<kGroups * 64, true>(args, blockIdx.x, args.value_dim);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same in the whole warp
  if (warp < 4 * kGroups) {
    if constexpr (kGroups == 2) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
    } else {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
    }
    StateRows<Element, K> state(args, work, warp * 16);
    OutRows<Element> out(args, work, warp * 16);
    state.load();
    int stage = 0;
    uint32_t parity = 0;
    for (int c = 0; c < work.sequence.chunks; ++c) {
      const uint32_t place = base + stage * Shared::kStage;
      scan_chunk(state, out, c, place, place + Shared::kValues + (warp >> 2) * 2048, warp & 3,
                 base + Shared::kBarriers + stage * 16, parity);
      if (++stage == Shared::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    state.store_final();
    return;
  }
  if constexpr (kGroups == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 112;");
  }
  ImageWarp<Element, K, GateElement, kGate, kGroups> image(args, work.head);
  const int first = static_cast<int>(work.sequence.first), length = static_cast<int>(work.sequence.length);
  for (int c = warp - 4 * kGroups; c < work.sequence.chunks; c += kMakers<kGroups>) {
    const int stage = c % Shared::kStages;
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (c >= Shared::kStages) barrier_wait(full + 8, (c / Shared::kStages - 1) & 1);
    const int token = c * kChunk;
    image.load(shared + stage * Shared::kStage, first + token, min(length - token, kChunk));
    load_values<Element, kGroups * 64>(args, work, c, image.place + Shared::kValues);
    copy_commit();
    prefetch_rows<Element, K, GateElement>(args, work.head, image.kv_head,
                                           first + token + kMakers<kGroups> * kChunk, first + length,
                                           work.head * args.value_dim + work.column, kGroups * 64);
    copy_wait<0>();
    __syncwarp();
    image.make();
    async_proxy_fence();
    barrier_arrive(full);
  }
}

}  // namespace kilin::cuda
