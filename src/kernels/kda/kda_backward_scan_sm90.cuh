// SPDX-License-Identifier: Apache-2.0
// The two scans over the chunks of a sequence and value head. With S the state before a chunk (V x K), H the
// gradient of the state after it, and the matrices of the chunk's image (kda_backward_sm90.cuh):
//     forward    U^T  = v^T A^T + S (minus w)^T              reverse    dU^T = dO^T P + H k^T [V][C]
//                S   <- S diag(decay) + U^T k                           H   <- H diag(decay) + dO^T q + dU^T
//                (minus w)
// S and H before each of these updates, rounded, and U and dU are kept. A warpgroup owns 64 rows of S or H as
// fp32 accumulators; rounded to 16 bits they and the rows v, dO, U, dU are A operands in registers, and
// everything else is a B operand that a bulk copy brought from the workspace. Rows do not depend on one
// another. One further warp loads the stages ahead.
#pragma once
#include "kernels/cuda/wgmma.cuh"
#include "kernels/kda/kda_backward_sm90.cuh"

namespace kilin::cuda::backward {

struct ScanArgs {
  KdaLayout layout;
  const uint8_t* images;
  const void* values;  // v or dO
  int64_t values_stride;
  int value_heads, value_dim;
  CudaStates from, to;  // states that the scan begins and ends with; data null: zeros, not written
  uint8_t* states;      // [chunks][HV] images [K / 64][V][64] in the 128-byte swizzle
  uint8_t* written;     // U or dU: [chunks][HV] images [V / 64][64][64] in the 128-byte swizzle
};

template <int K, bool kReverse>
struct ScanShared {
  using Image = KdaImage<K>;
  static constexpr int kMinusW = 0;
  static constexpr int kK = Image::kTile;
  static constexpr int kQ = 2 * Image::kTile;                        // reverse only
  static constexpr int kSquare = (kReverse ? 3 : 2) * Image::kTile;  // A or P
  static constexpr int kDecay = kSquare + Image::kSquare;
  static constexpr int kLoaded = kDecay + K * 4;
  static constexpr int kValues = (kLoaded + 1023) / 1024 * 1024;  // v or dO, then U or dU: [64][64]
  static constexpr int kStage = kValues + 8192;
  static constexpr int kStages = 4 * kStage + 1024 <= 232448 ? 4 : 3;
  static constexpr int kBarriers = kStages * kStage;  // full, empty of each stage
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
  static_assert(kBytes <= 232448);
};

// One warp: loads the stages in the order of the scan.
template <class Element, int K, bool kReverse>
__device__ __forceinline__ void scan_load(const ScanArgs& args, const KdaSequence& sequence, int head,
                                          int column, uint32_t base) {
  using Image = KdaImage<K>;
  using Shared = ScanShared<K, kReverse>;
  const int lane = threadIdx.x & 31;
  const Element* rows = static_cast<const Element*>(args.values) + sequence.first * args.values_stride +
                        static_cast<int64_t>(head) * args.value_dim + column;
  const uint8_t* images = args.images + (sequence.chunk * args.value_heads + head) * Image::kBytes;
  for (int i = 0; i < sequence.chunks; ++i) {
    const int c = kReverse ? sequence.chunks - 1 - i : i;
    const int stage = i % Shared::kStages;
    const uint32_t place = base + stage * Shared::kStage;
    const uint32_t full = base + Shared::kBarriers + stage * 16;
    if (i >= Shared::kStages) barrier_wait(full + 8, (i / Shared::kStages - 1) & 1);
    if (lane == 0) {
      const uint8_t* image = images + static_cast<int64_t>(c) * args.value_heads * Image::kBytes;
      barrier_arrive_expect(full, Shared::kLoaded);
      bulk_load(place + Shared::kMinusW, image + Image::kMinusW, Image::kTile, full);
      bulk_load(place + Shared::kK, image + Image::kK, Image::kTile, full);
      if (kReverse) bulk_load(place + Shared::kQ, image + Image::kQ, Image::kTile, full);
      bulk_load(place + Shared::kSquare, image + (kReverse ? Image::kP : Image::kA), Image::kSquare, full);
      bulk_load(place + Shared::kDecay, image + Image::kDecay, K * 4, full);
    }
    const int64_t left = sequence.length - static_cast<int64_t>(c) * kChunk;
#pragma unroll 4
    for (int j = lane; j < 512; j += 32) {
      const int r = j / 8, piece = j % 8;
      const bool valid = r < left;
      copy_16_async(
          place + Shared::kValues + swizzled<kChunk>(r, piece),
          rows + (static_cast<int64_t>(c) * kChunk + (valid ? r : 0)) * args.values_stride + piece * 8,
          valid);
    }
    barrier_arrive_copies(full);
  }
}

// One warp: 16 rows of S or H.
template <class Element, int K, bool kReverse>
struct Scan {
  using Image = KdaImage<K>;
  using Shared = ScanShared<K, kReverse>;
  static constexpr int kSteps = K / 16;

  const ScanArgs& args;
  KdaSequence sequence;
  int number, head, column;  // sequence, value head, first row of this warp
  uint8_t* shared;
  uint32_t base;
  int lane, g, t, warp, block;  // warp within the warpgroup, block of 64 values
  float s[K / 2];

  __device__ __forceinline__ int64_t state_index(int64_t slot, int64_t stride, int half, int n) const {
    return slot * stride + (static_cast<int64_t>(head) * args.value_dim + column + g + 8 * half) * K + 8 * n +
           2 * t;
  }

  // Calls body(index of a pair in `states`, its place in s).
  template <class Body>
  __device__ __forceinline__ void each_pair(const CudaStates& states, Body body) const {
    if (states.data == nullptr) return;
    const int64_t slot = states.slots != nullptr ? states.slots[number] : number;
    if (slot < 0) return;
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) body(state_index(slot, states.slot_stride, h, n), 4 * n + 2 * h);
    }
  }

  __device__ __forceinline__ void load_state() {
#pragma unroll
    for (int i = 0; i < K / 2; ++i) s[i] = 0.0f;
    each_pair(args.from, [&](int64_t index, int i) {
      const float2 pair = load_pair(args.from.data, args.from.type, index);
      s[i] = pair.x;
      s[i + 1] = pair.y;
    });
  }

  __device__ __forceinline__ void store_state() const {
    each_pair(args.to, [&](int64_t index, int i) {
      store_pair(args.to.data, args.to.type, index, {s[i], s[i + 1]});
    });
  }

  // S or H, rounded, to its image [K / 64][V][64] in the 128-byte swizzle
  __device__ __forceinline__ void keep_state(const uint32_t (&rounded)[kSteps][4], int c) const {
    uint8_t* to = args.states +
                  ((sequence.chunk + c) * args.value_heads + head) * (int64_t{2} * K * args.value_dim) +
                  (column + g) * 128 + 4 * t;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int piece = ((2 * i + (j >> 1)) & 7) ^ g;
        *reinterpret_cast<uint32_t*>(to + (i >> 2) * (args.value_dim * 128) + (j & 1) * 1024 + (piece << 4)) =
            rounded[i][j];
      }
    }
  }

  // 16 rows and 64 tokens of U^T or dU^T through this warp's columns of the place of v or dO to their image.
  __device__ __forceinline__ void keep_written(const uint32_t (&r)[4][4], uint32_t values, int c) const {
    __syncwarp();  // v or dO has been read by all lanes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * (2 * i + (lane >> 4)) + (lane & 7);
      stmatrix_trans(values + swizzled<kChunk>(token, 2 * warp + ((lane >> 3) & 1)), r[i][0], r[i][1],
                     r[i][2], r[i][3]);
    }
    __syncwarp();
    uint8_t* to = args.written +
                  (((sequence.chunk + c) * args.value_heads + head) * (args.value_dim / 64) + block) * 8192;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t place = swizzled<kChunk>(16 * i + (lane >> 1), 2 * warp + (lane & 1));
      *reinterpret_cast<uint4*>(to + place) = load_shared_16(values + place);
    }
  }

  // r = v^T A^T + S (minus w)^T, or dO^T P + H k^T
  __device__ __forceinline__ void begin_written(float (&r)[32], const uint32_t (&values)[4][4],
                                                const uint32_t (&rounded)[kSteps][4], uint32_t place) const {
    const uint64_t square = swizzled_matrix(place + Shared::kSquare, kReverse ? 8192 : 16, 1024);
    const uint64_t keys = swizzled_matrix(place + (kReverse ? Shared::kK : Shared::kMinusW), 16, 1024);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      wgmma<Element, kReverse ? 1 : 0>(r, values[i], square + i * (kReverse ? 128 : 2), i > 0);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      wgmma<Element, 0>(r, rounded[i], keys + (i / 4) * 512 + (i % 4) * 2, true);
    wgmma_commit();
  }

  __device__ __forceinline__ void run() {
    load_state();
    for (int order = 0; order < sequence.chunks; ++order) {
      const int c = kReverse ? sequence.chunks - 1 - order : order;
      const int stage = order % Shared::kStages;
      const uint32_t place = base + stage * Shared::kStage;
      const uint32_t full = base + Shared::kBarriers + stage * 16;
      const uint32_t values_place = place + Shared::kValues;
      uint32_t rounded[kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) pack_operand<Element>(s + 8 * i, rounded[i]);
      keep_state(rounded, c);
      barrier_wait(full, (order / Shared::kStages) & 1);
      uint32_t values[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 16 * i + (lane & 7) + 8 * (lane >> 4);
        ldmatrix_trans(values[i], values_place + swizzled<kChunk>(token, 2 * warp + ((lane >> 3) & 1)));
      }
      float r[32];
      wgmma_fence();
      begin_written(r, values, rounded, place);
      const float* decay =
          reinterpret_cast<const float*>(shared + stage * Shared::kStage + Shared::kDecay) + 2 * t;
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(decay + 8 * n);
        s[4 * n] *= factor.x;
        s[4 * n + 1] *= factor.y;
        s[4 * n + 2] *= factor.x;
        s[4 * n + 3] *= factor.y;
      }
      wgmma_wait<0>();
      uint32_t written[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pack_operand<Element>(r + 8 * i, written[i]);
      wgmma_fence();
      if constexpr (kReverse) {
        const uint64_t q = swizzled_matrix(place + Shared::kQ, 8192, 1024);
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma<Element, 1>(s, values[i], q + i * 128, true);
      }
      const uint64_t keys = swizzled_matrix(place + (kReverse ? Shared::kMinusW : Shared::kK), 8192, 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma<Element, 1>(s, written[i], keys + i * 128, true);
      wgmma_commit();
      keep_written(written, values_place, c);
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8);
    }
    store_state();
  }
};

template <class Element, int K, bool kReverse>
__global__ void __launch_bounds__(160, 1) kda_backward_scan(const __grid_constant__ ScanArgs args) {
  using Shared = ScanShared<K, kReverse>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int parts = args.value_dim / 64;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int head = static_cast<int>(blockIdx.x) / parts % args.value_heads;
  const int number = static_cast<int>(blockIdx.x) / parts / args.value_heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(base + Shared::kBarriers + 16 * i, 33);
      barrier_init(base + Shared::kBarriers + 16 * i + 8, 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const KdaSequence sequence = kda_sequence(args.layout, number);
  const int warp =
      __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0);  // known to be the same in the whole warp
  if (warp == 4) {
    scan_load<Element, K, kReverse>(args, sequence, head, part * 64, base);
    copy_wait<0>();
  } else {
    const int lane = threadIdx.x & 31;
    Scan<Element, K, kReverse> scan{.args = args,
                                    .sequence = sequence,
                                    .number = number,
                                    .head = head,
                                    .column = part * 64 + warp * 16,
                                    .shared = shared,
                                    .base = base,
                                    .lane = lane,
                                    .g = lane >> 2,
                                    .t = lane & 3,
                                    .warp = warp,
                                    .block = part};
    scan.run();
  }
}

}  // namespace kilin::cuda::backward
