// SPDX-License-Identifier: Apache-2.0
// Second kernel of the chunked form on Hopper: the scan over the chunks of a sequence and value head. With S the state
// (V x K) before a chunk and the matrices of its image (kda_sm90.cuh):
//     R = v^T A^T + S (minus w)^T         [V][C], what the delta rule writes
//     out^T = S q^T + R P^T
//     S <- S diag(decay) + R k
// A warpgroup owns 64 rows of S as fp32 accumulators; S and R, rounded to 16 bits, are A operands in registers, and
// everything else is a B operand that one bulk copy brought from the workspace. Rows of S do not depend on one
// another, so the split of V over blocks changes no bit. One further warp loads the stages ahead.
#pragma once
#include "kernels/cuda/wgmma.cuh"
#include "kernels/kda/kda_sm90.cuh"

namespace kilin::cuda {

template <int K, int kGroups>
struct ScanShared {
  static constexpr int kValues = (KdaImage<K>::kBytes + 1023) / 1024 * 1024;  // v, then out: [kGroups][64][64]
  static constexpr int kStage = kValues + kGroups * 8192;
  static constexpr int kStages = 3 * kStage + 1024 <= 232448 ? 3 : 2;
  static constexpr int kBarriers = kStages * kStage;  // full, empty of each stage
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
};

// The sequence of this block.
struct ScanSequence {
  int64_t first;  // token
  int64_t length;
  int64_t chunk;  // first chunk
  int chunks;
};

__device__ __forceinline__ ScanSequence scan_sequence(const KdaLayout& layout, int n) {
  if (layout.offsets == nullptr) {
    return {n * layout.length, layout.length, static_cast<int64_t>(n) * layout.chunks_per_sequence,
            layout.chunks_per_sequence};
  }
  const int64_t first = layout.starts[n];
  return {first, layout.starts[n + 1] - first, layout.offsets[n], layout.offsets[n + 1] - layout.offsets[n]};
}

template <class Element, int K, int kGroups>
__device__ __forceinline__ void scan_load(const KdaScanArgs& args, const ScanSequence& sequence, int head, int column,
                                          uint32_t base) {
  using Image = KdaImage<K>;
  using Shared = ScanShared<K, kGroups>;
  const int lane = threadIdx.x & 31;
  const Element* v = static_cast<const Element*>(args.v) + sequence.first * args.v_stride + head * args.value_dim + column;
  const uint8_t* images = args.images + (sequence.chunk * args.value_heads + head) * Image::kBytes;
  for (int c = 0; c < sequence.chunks; ++c) {
    const int stage = c % Shared::kStages;
    const uint32_t place = base + stage * Shared::kStage;
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (c >= Shared::kStages) barrier_wait(full + 8, (c / Shared::kStages - 1) & 1);
    if (lane == 0) {
      barrier_arrive_expect(full, Image::kBytes);
      bulk_load(place, images + static_cast<int64_t>(c) * args.value_heads * Image::kBytes, Image::kBytes, full);
    }
    const int64_t left = sequence.length - static_cast<int64_t>(c) * kChunk;
#pragma unroll 4
    for (int i = lane; i < kGroups * 512; i += 32) {
      const int r = i / (8 * kGroups), piece = i % (8 * kGroups);
      const bool valid = r < left;
      copy_16_async(place + Shared::kValues + swizzled(r, piece),
                    v + (static_cast<int64_t>(c) * kChunk + (valid ? r : 0)) * args.v_stride + piece * 8, valid);
    }
    barrier_arrive_copies(full);
  }
}

// One warp: 16 rows of the state.
template <class Element, int K, int kGroups>
struct Scan {
  using Image = KdaImage<K>;
  using Shared = ScanShared<K, kGroups>;

  const KdaScanArgs& args;
  ScanSequence sequence;
  int number, head, column;  // sequence, value head, first row of S of this warp
  uint8_t* shared;
  uint32_t base;
  int lane, g, t, group, warp;  // warp within the warpgroup
  float s[K / 2];

  // The place of row g + 8 half, columns 8 n + 2t of the state of slot `slot`.
  __device__ __forceinline__ int64_t state_index(int64_t slot, int64_t stride, int half, int n) const {
    return slot * stride + (static_cast<int64_t>(head) * args.value_dim + column + g + 8 * half) * K + 8 * n + 2 * t;
  }

  __device__ __forceinline__ void store_pair(void* to, CudaType type, int64_t index, float x, float y) const {
    if (type == CudaType::kF32) {
      *reinterpret_cast<float2*>(static_cast<float*>(to) + index) = {x, y};
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + index) =
          type == CudaType::kBf16 ? pack<__nv_bfloat16>(x, y) : pack<__half>(x, y);
    }
  }

  __device__ __forceinline__ void load_state() {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) s[i] = 0.0f;
    if (args.initial.data == nullptr) return;
    const int64_t slot = args.initial.slots != nullptr ? args.initial.slots[number] : number;
    if (slot < 0) return;
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t index = state_index(slot, args.initial.slot_stride, h, n);
        float2 pair;
        if (args.initial.type == CudaType::kF32) {
          pair = *reinterpret_cast<const float2*>(static_cast<const float*>(args.initial.data) + index);
        } else {
          pair = unpack<__nv_bfloat16>(
              *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(args.initial.data) + index));
        }
        s[4 * n + 2 * h] = pair.x;
        s[4 * n + 2 * h + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ void store_state(void* to, CudaType type, int64_t slot, int64_t stride) const {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_pair(to, type, state_index(slot, stride, h, n), s[4 * n + 2 * h], s[4 * n + 2 * h + 1]);
    }
  }

  // out^T of 16 rows and 64 tokens through this warp's columns of the place of v, 32 bytes per token.
  __device__ __forceinline__ void store_out(const float (&out)[32], uint32_t values, int c) const {
    __syncwarp();  // v has been read by all lanes
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      const int token = 8 * (n + (lane >> 4)) + (lane & 7);
      stmatrix_trans(values + swizzled(token, 2 * warp + ((lane >> 3) & 1)), pack<Element>(out[4 * n], out[4 * n + 1]),
                     pack<Element>(out[4 * n + 2], out[4 * n + 3]), pack<Element>(out[4 * n + 4], out[4 * n + 5]),
                     pack<Element>(out[4 * n + 6], out[4 * n + 7]));
    }
    __syncwarp();
    const int64_t left = sequence.length - static_cast<int64_t>(c) * kChunk;
    Element* to = static_cast<Element*>(args.out) +
                  (sequence.first + static_cast<int64_t>(c) * kChunk) * args.out_stride + head * args.value_dim + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * i + (lane >> 1), piece = lane & 1;
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(values + swizzled(token, 2 * warp + piece))
                   : "memory");
      if (token < left) *reinterpret_cast<uint4*>(to + token * args.out_stride + piece * 8) = x;
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kSteps = K / 16;
    load_state();
    for (int c = 0; c < sequence.chunks; ++c) {
      const int stage = c % Shared::kStages;
      const uint32_t place = base + stage * Shared::kStage;
      const uint32_t full = base + Shared::kBarriers + stage * 16;
      const uint32_t values = place + Shared::kValues + group * 8192;
      if (args.chunk_states != nullptr)
        store_state(args.chunk_states, args.chunk_state_type, sequence.chunk + c,
                    static_cast<int64_t>(args.value_heads) * args.value_dim * K);
      uint32_t rounded[kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) rounded[i][j] = pack<Element>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
      }
      barrier_wait(full, (c / Shared::kStages) & 1);
      uint32_t v[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 16 * i + (lane & 7) + 8 * (lane >> 4);
        ldmatrix_trans(v[i], values + swizzled(token, 2 * warp + ((lane >> 3) & 1)));
      }
      float r[32], out[32];
      wgmma_fence();
      const uint64_t a = swizzled_matrix(place + Image::kA, 16, 1024);
      const uint64_t w = swizzled_matrix(place + Image::kMinusW, 16, 1024);
      const uint64_t q = swizzled_matrix(place + Image::kQ, 16, 1024);
      const uint64_t p = swizzled_matrix(place + Image::kP, 16, 1024);
      const uint64_t k = swizzled_matrix(place + Image::kK, 8192, 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma<Element, 0>(r, v[i], a + i * 2, i > 0);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) wgmma<Element, 0>(r, rounded[i], w + (i / 4) * 512 + (i % 4) * 2, true);
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) wgmma<Element, 0>(out, rounded[i], q + (i / 4) * 512 + (i % 4) * 2, i > 0);
      wgmma_commit();
      const float* decay = reinterpret_cast<const float*>(shared + stage * Shared::kStage + Image::kDecay) + 2 * t;
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n);
        s[4 * n] *= factor.x;
        s[4 * n + 1] *= factor.y;
        s[4 * n + 2] *= factor.x;
        s[4 * n + 3] *= factor.y;
      }
      wgmma_wait<1>();
      uint32_t written[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) written[i][j] = pack<Element>(r[8 * i + 2 * j], r[8 * i + 2 * j + 1]);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma<Element, 1>(s, written[i], k + i * 128, true);
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma<Element, 0>(out, written[i], p + i * 2, true);
      wgmma_commit();
      wgmma_wait<0>();
      store_out(out, values, c);
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8);
    }
    if (args.final.data == nullptr) return;
    const int64_t slot = args.final.slots != nullptr ? args.final.slots[number] : number;
    if (slot >= 0) store_state(args.final.data, args.final.type, slot, args.final.slot_stride);
  }
};

template <class Element, int K, int kGroups>
__global__ void __launch_bounds__(kGroups * 128 + 128, 1) kda_scan(const __grid_constant__ KdaScanArgs args) {
  using Shared = ScanShared<K, kGroups>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int parts = args.value_dim / (64 * kGroups);
  const int part = blockIdx.x % parts;
  const int head = blockIdx.x / parts % args.value_heads;
  const int number = blockIdx.x / parts / args.value_heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(base + Shared::kBarriers + 16 * i, 33);
      barrier_init(base + Shared::kBarriers + 16 * i + 8, 4 * kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  const ScanSequence sequence = scan_sequence(args.layout, number);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same in the whole warp
  if (warp >= 4 * kGroups) {
    if constexpr (kGroups == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 4 * kGroups) {
      scan_load<Element, K, kGroups>(args, sequence, head, part * 64 * kGroups, base);
      copy_wait<0>();
    }
  } else {
    if constexpr (kGroups == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int lane = threadIdx.x & 31;
    Scan<Element, K, kGroups> scan{.args = args,
                                   .sequence = sequence,
                                   .number = number,
                                   .head = head,
                                   .column = part * 64 * kGroups + warp * 16,
                                   .shared = shared,
                                   .base = base,
                                   .lane = lane,
                                   .g = lane >> 2,
                                   .t = lane & 3,
                                   .group = warp >> 2,
                                   .warp = warp & 3};
    scan.run();
  }
}

}  // namespace kilin::cuda
