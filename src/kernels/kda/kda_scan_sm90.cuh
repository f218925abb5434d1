// SPDX-License-Identifier: Apache-2.0
// The scan over the chunks of a sequence and value head on Hopper, from images in the workspace. With S the
// state (V x K) before a chunk and the matrices of its image (kda_sm90.cuh):
//     R = v^T A^T + S (minus w)^T         [V][C], what the delta rule writes
//     out^T = S q^T + R P^T
//     S <- S diag(decay) + R keys
// A warp owns 16 rows of S as fp32 accumulators; S and R, rounded to 16 bits, are A operands in registers,
// and everything else is a B operand from shared memory, where one further warp puts the stages ahead. Rows
// of S do not depend on one another, so the split of V over warps and blocks changes no bit. The chain from S
// to S is what counts: warp products (mma) have half the latency of the warpgroup's for these sizes.
#pragma once
#include "kernels/kda/kda_state_sm90.cuh"

namespace kilin::cuda {

template <class Element, int K, int kWarps>
struct ScanWarp {
  using Image = KdaImage<K>;
  static constexpr int kSteps = K / 16;

  StateRows<Element, K> state;
  int warp;

  // The order matters (docs/notes/20261125-cuda-forward.md): first the chain from S to S, then q S and out.
  // Storing out or waiting for the next stage inside the chain costs more than it hides.
  __device__ __forceinline__ void chunk(int c, uint32_t place, const uint8_t* pointer, uint32_t values,
                                        uint32_t full, uint32_t parity) {
    const int lane = state.lane;
    state.store_chunk_state(c);
    uint32_t rounded[kSteps][4];
    state.round(rounded);
    barrier_wait(full, parity);
    uint32_t v[4], a[4], p[4];
    ldmatrix_trans(v, state.values_block(values, warp & 3));
    const uint32_t core = (lane >> 4) * 256 + ((lane >> 3) & 1) * 128 + (lane & 7) * 16;
    ldmatrix(a, place + Image::kA + core);
    ldmatrix(p, place + Image::kP + core);
    // Rows of the image as B operands: lanes address 8 rows x (k 0 to 7, 8 to 15), then the next 8 rows.
    const int row = (lane & 7) + ((lane >> 4) << 3);
    const auto rows = [&](int first, int step) {
      return place + Image::kRows + (step >> 2) * 4096 + (first + row) * 128 +
             ((((2 * step) & 7) | ((lane >> 3) & 1)) ^ (lane & 7)) * 16;
    };
    // Two accumulators for even and odd steps: half the latency.
    float r[2][2][4] = {}, out[2][4] = {};
    mma<Element>(r[0][0], v, a[0], a[1]);
    mma<Element>(r[0][1], v, a[2], a[3]);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t w[4];
      ldmatrix(w, rows(0, i));
      mma<Element>(r[i & 1][0], rounded[i], w[0], w[1]);
      mma<Element>(r[i & 1][1], rounded[i], w[2], w[3]);
    }
    state.decay(pointer + Image::kDecay);
    const uint32_t written[4] = {pack<Element>(r[0][0][0] + r[1][0][0], r[0][0][1] + r[1][0][1]),
                                 pack<Element>(r[0][0][2] + r[1][0][2], r[0][0][3] + r[1][0][3]),
                                 pack<Element>(r[0][1][0] + r[1][1][0], r[0][1][1] + r[1][1][1]),
                                 pack<Element>(r[0][1][2] + r[1][1][2], r[0][1][3] + r[1][1][3])};
    float(&s)[K / 2] = state.s;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      // keys [token][channel] transposed: lanes address 8 tokens x 8 channels, tokens first.
      uint32_t k[4];
      ldmatrix_trans(k, place + Image::kKeys + (i >> 2) * 2048 + (lane & 15) * 128 +
                            ((((2 * i) & 7) | (lane >> 4)) ^ (lane & 7)) * 16);
      mma<Element>(*reinterpret_cast<float(*)[4]>(&s[8 * i]), written, k[0], k[1]);
      mma<Element>(*reinterpret_cast<float(*)[4]>(&s[8 * i + 4]), written, k[2], k[3]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t q[4];
      ldmatrix(q, rows(16, i));
      mma<Element>(out[0], rounded[i], q[0], q[1]);
      mma<Element>(out[1], rounded[i], q[2], q[3]);
    }
    mma<Element>(out[0], written, p[0], p[1]);
    mma<Element>(out[1], written, p[2], p[3]);
    const float both[8] = {out[0][0], out[0][1], out[0][2], out[0][3],
                           out[1][0], out[1][1], out[1][2], out[1][3]};
    state.store_out(both, values, warp & 3);
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8);
  }
};

template <class Element, int K, int kWarps>
__global__ void __launch_bounds__(kWarps * 32 + 32, 1) kda_scan(const __grid_constant__ KdaArgs args) {
  using Shared = ScanShared<K, kWarps * 16, 12>;
  using Image = KdaImage<K>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  init_stages<Shared::kStages>(base + Shared::kBarriers, 33, kWarps);
  grid_wait();
  const ScanWork work = scan_work<kWarps * 16>(args, blockIdx.x);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same in the whole warp
  if (warp < kWarps) {
    ScanWarp<Element, K, kWarps> scan{.state = StateRows<Element, K>(args, work, warp * 16), .warp = warp};
    scan.state.load();
    int stage = 0;
    uint32_t parity = 0;
    for (int c = 0; c < work.sequence.chunks; ++c) {
      const uint32_t place = base + stage * Shared::kStage;
      scan.chunk(c, place, shared + stage * Shared::kStage, place + Shared::kValues + (warp >> 2) * 2048,
                 base + Shared::kBarriers + stage * 16, parity);
      if (++stage == Shared::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    scan.state.store_final();
    return;
  }
  const uint8_t* images = args.images + (work.sequence.chunk * args.value_heads + work.head) * Image::kBytes;
  for (int c = 0; c < work.sequence.chunks; ++c) {
    const int stage = c % Shared::kStages;
    const uint32_t place = base + stage * Shared::kStage;
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (c >= Shared::kStages) barrier_wait(full + 8, (c / Shared::kStages - 1) & 1);
    if ((threadIdx.x & 31) == 0) {
      barrier_arrive_expect(full, Image::kBytes);
      bulk_load(place, images + static_cast<int64_t>(c) * args.value_heads * Image::kBytes, Image::kBytes,
                full);
    }
    load_values<Element, kWarps * 16>(args, work, c, place + Shared::kValues);
    barrier_arrive_copies(full);
  }
  copy_wait<0>();
}

}  // namespace kilin::cuda
