// SPDX-License-Identifier: Apache-2.0
// The scan over the chunks of a sequence and value head on Hopper, from images in the workspace. With S the
// state (V x K) before a chunk and the matrices of its image (kda_sm90.cuh):
//     R = v^T A^T diag(c) + S (minus w)^T [V][C], what the delta rule writes
//     out^T = S q^T + R P^T
//     S <- S diag(decay) + R keys
// A warp owns 16 rows of S as fp32 accumulators; S and R, rounded to 16 bits, are A operands in registers,
// and everything else is a B operand from shared memory, where one further warp puts the stages ahead. Rows
// of S do not depend on one another, so the split of V over warps and blocks changes no bit. The chain from S
// to S is what counts: warp products (mma) have half the latency of the warpgroup's for these sizes.
#pragma once
#include "kernels/kda/kda_state_sm90.cuh"

namespace kilin::cuda {

// With few sequences and heads, long sequences are cut into segments (docs/math/kda.md, segments): S -> S M +
// B over a segment, exactly. First B, the state that the segment makes of 0, and M, its rows those of the
// identity with nothing written from v (kSummary); then the states before the segments, one after another
// (kda_starts); then all segments at once.

// A block: kRows / 16 warps that scan, and one that loads.
template <int K, int kRows, bool kSummary>
struct ScanBlock {
  static constexpr int kWarps = kRows / 16;
  static constexpr int kThreads = (kWarps + 1) * 32;
  static constexpr int kPerMultiprocessor = kSummary ? 2 : 1;
  using Stages = ScanShared<K, kRows, 12 / kPerMultiprocessor>;
  static constexpr int kStaged = Stages::kBytes;  // out of each warp, [16 tokens][16]
  static constexpr int kBytes = kStaged + kWarps * 512;
  static_assert(kStaged % 16 == 0 && kBytes * kPerMultiprocessor <= 232448);
};

// Block (ScanBlock here): says where the stages and this warp's place for out are.
template <class Element, int K, class Block, bool kSummary>
struct ScanWarp {
  using Shared = typename Block::Stages;
  using Image = KdaImage<K>;
  static constexpr int kSteps = K / 16;

  StateRows<Element, K> state;
  OutRows<Element> out;
  int lane;
  uint32_t values_count;                                 // all ones, or 0 for rows of M
  uint32_t row_base, key_base, square_base, value_base;  // of this lane in a stage
  uint32_t staged;
  // Of a chunk, from before it begins: minus w as B operands, decay, v^T A^T diag(c).
  uint32_t w[kSteps][4];
  float4 decay[kSteps];
  float from_v[2][4];

  __device__ __forceinline__ ScanWarp(const KdaArgs& args, const ScanWork& work, int number, uint32_t base)
      : state(args, work, number * 16),
        out(args, work, number * 16, 1),
        lane(threadIdx.x & 31),
        staged(base + Block::kStaged + number * 512) {
    // Rows of the image as B operands: lanes address 8 rows x (k 0 to 7, 8 to 15), then the next 8 rows. Keys
    // [token][channel] transposed: 8 tokens x 8 channels, tokens first.
    values_count = kSummary && work.column >= args.value_dim ? 0 : ~0u;
    row_base = ((lane & 7) + ((lane >> 4) << 3)) * 128 + (((lane >> 3) & 1) ^ (lane & 7)) * 16;
    key_base = Image::kKeys + (lane & 15) * 128 + ((lane >> 4) ^ (lane & 7)) * 16;
    square_base = (lane >> 4) * 256 + ((lane >> 3) & 1) * 128 + (lane & 7) * 16;
    value_base = values_block(Shared::kValues + (number >> 2) * 2048, number & 3);
    out.step = kept_in_register(out.step);
    state.keep = kept_in_register(state.keep);
    row_base = kept_in_register(row_base, lane);
    key_base = kept_in_register(key_base, lane);
    square_base = kept_in_register(square_base, lane);
    value_base = kept_in_register(value_base, lane);
  }

  // Address of step i of a swizzled matrix with kMatrixRows rows: of every 64 channels four steps, told apart
  // by two bits of the place in the row.
  template <int kMatrixRows>
  __device__ __forceinline__ static uint32_t step(uint32_t address, int i) {
    return (address ^ ((i & 3) * 32)) + (i >> 2) * (kMatrixRows * 128);
  }

  // What fetch() reads for from_v.
  struct Values {
    uint32_t v[4], a[4];
    float2 factor[2];  // of tokens 2t, 2t + 1 (+ 8)
  };
  __device__ __forceinline__ Values fetch(uint32_t place) {
    Values x;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) ldmatrix(w[i], step<32>(place + row_base, i));
    ldmatrix_trans(x.v, place + value_base);
    ldmatrix(x.a, place + Image::kA + square_base);
    if constexpr (kSummary) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x.v[i] &= values_count;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      decay[i] = load_shared_floats(place + Image::kDecay + state.t * 16 + 64 * i);
#pragma unroll
    for (int n = 0; n < 2; ++n) x.factor[n] = load_shared_pair(place + Image::kFactor + state.t * 8 + 32 * n);
    return x;
  }
  __device__ __forceinline__ void multiply(const Values& x) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      from_v[n][0] = from_v[n][1] = from_v[n][2] = from_v[n][3] = 0.0f;
      mma<Element>(from_v[n], x.v, x.a[2 * n], x.a[2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) from_v[n][i] *= (i & 1) == 0 ? x.factor[n].x : x.factor[n].y;
    }
  }

  // What follows from S to S comes first, out behind it; it is stored during the next chunk. `ready`: the
  // next chunk's image is there. The branch on it stands where the assembler must not move products of the
  // second half into the first (docs/notes/20261125-cuda-forward.md).
  __device__ __forceinline__ void chunk(int c, uint32_t place, uint32_t full, bool last, uint32_t next_place,
                                        uint32_t next_full, uint32_t next_parity) {
    const bool ready = barrier_done(next_full, next_parity);
    uint32_t rounded[kSteps][4], keys[kSteps][4], q[kSteps][4], p[4];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) ldmatrix_trans(keys[i], step<16>(place + key_base, i));
    uint4 row;  // out of the chunk before
    if constexpr (!kSummary) row = load_shared_16(staged + lane * 16);
    state.round(rounded);
    // Two accumulators for even and odd steps: half the latency.
    float r[2][2][4] = {}, sum[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[1][n][i] = from_v[n][i];
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      mma<Element>(r[i & 1][0], rounded[i], w[i][0], w[i][1]);
      mma<Element>(r[i & 1][1], rounded[i], w[i][2], w[i][3]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) state.decay(i, decay[i]);
    uint32_t written[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      written[i] = pack<Element>(r[0][i >> 1][2 * (i & 1)] + r[1][i >> 1][2 * (i & 1)],
                                 r[0][i >> 1][2 * (i & 1) + 1] + r[1][i >> 1][2 * (i & 1) + 1]);
    }
    // Not behind the branch, where the compiler would move them.
#pragma unroll
    for (int i = 0; i < K / 2; ++i) asm volatile("" : "+f"(state.s[i]));
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(written[i]));
    if (!ready && !last) barrier_wait(next_full, next_parity);
    if constexpr (!kSummary) {
      ldmatrix(p, place + Image::kP + square_base);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) ldmatrix(q[i], step<32>(place + row_base, i) + 16 * 128);
    }
    float(&s)[K / 2] = state.s;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      mma<Element>(*reinterpret_cast<float(*)[4]>(&s[8 * i]), written, keys[i][0], keys[i][1]);
      mma<Element>(*reinterpret_cast<float(*)[4]>(&s[8 * i + 4]), written, keys[i][2], keys[i][3]);
    }
    const Values next = fetch(next_place);  // behind the last chunk: nothing that is used
    if constexpr (!kSummary) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        mma<Element>(sum[0], rounded[i], q[i][0], q[i][1]);
        mma<Element>(sum[1], rounded[i], q[i][2], q[i][3]);
      }
      mma<Element>(sum[0], written, p[0], p[1]);
      mma<Element>(sum[1], written, p[2], p[3]);
      out.put(row, c > 0);
    }
    multiply(next);
    if constexpr (!kSummary) stage(sum);
    barrier_arrive(full + 8);
    if constexpr (!kSummary) {
      if (!last) state.store_chunk_state(c + 1);
    }
  }

  __device__ __forceinline__ void stage(const float (&sum)[2][4]) {
    __syncwarp();
    stmatrix_trans(staged + ((lane & 7) + 8 * (lane >> 4)) * 32 + ((lane >> 3) & 1) * 16,
                   pack<Element>(sum[0][0], sum[0][1]), pack<Element>(sum[0][2], sum[0][3]),
                   pack<Element>(sum[1][0], sum[1][1]), pack<Element>(sum[1][2], sum[1][3]));
    __syncwarp();
  }

  __device__ __forceinline__ void load() {
    const KdaArgs& args = state.args;
    const ScanWork& work = state.work;
    if constexpr (kSummary) {
      if (values_count == 0) {
        state.load_identity(state.column - args.value_dim);
      } else if (work.segment > 0) {
        state.clear();
      } else {
        // A copy: the final state may be written where the initial one stands.
        state.load();
        state.store_rows(work.template start<K>(args, 0), state.column);
      }
    } else if (args.segments > 1) {
      state.load_rows(work.template start<K>(args, work.segment), state.column);
    } else {
      state.load();
    }
  }

  __device__ __forceinline__ void run(uint32_t base) {
    load();
    const int chunks = state.work.sequence.chunks;
    if (chunks > 0) {
      if constexpr (!kSummary) state.store_chunk_state(0);
      barrier_wait(base + Shared::kBarriers, 0);
      multiply(fetch(base));
    }
    int next = 0;
    uint32_t parity = 0;
    for (int c = 0; c < chunks; ++c) {
      const int now = next;
      if (++next == Shared::kStages) {
        next = 0;
        parity ^= 1;
      }
      chunk(c, base + now * Shared::kStage, base + Shared::kBarriers + now * 16, c + 1 == chunks,
            base + next * Shared::kStage, base + Shared::kBarriers + next * 16, parity);
    }
    if constexpr (kSummary) {
      state.store_rows(state.work.template summary<K>(state.args), state.column);
    } else {
      out.put(load_shared_16(staged + lane * 16), chunks > 0);
      state.store_final();
    }
  }
};

template <class Element, int K, int kRows, bool kSummary>
__global__ void __launch_bounds__(ScanBlock<K, kRows, kSummary>::kThreads,
                                  (ScanBlock<K, kRows, kSummary>::kPerMultiprocessor))
    kda_scan(const __grid_constant__ KdaArgs args) {
  using Block = ScanBlock<K, kRows, kSummary>;
  using Shared = typename Block::Stages;
  using Image = KdaImage<K>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  init_stages<Shared::kStages>(base + Shared::kBarriers, 33, 32 * Block::kWarps);
  grid_wait();
  ScanWork work = kSummary ? scan_work<kRows>(args, blockIdx.x, args.value_dim + K, args.segments - 1)
                           : scan_work<kRows>(args, blockIdx.x, args.value_dim, args.segments);
  const bool of_values = work.column < args.value_dim;
  if constexpr (kSummary) {
    // Nobody asks what the last segment makes of its start, and the first one's start is known.
    if (work.ends) work.sequence.chunks = 0;
    if (work.segment == 0 ? !of_values : work.sequence.chunks == 0) return;
  }
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be the same in the whole warp
  if (warp < Block::kWarps) {
    ScanWarp<Element, K, Block, kSummary>(args, work, warp, base).run(base);
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
    if (of_values) load_values<Element, kRows>(args, work, c, place + Shared::kValues);
    barrier_arrive_copies(full);
  }
  copy_wait<0>();
}

// The states before the segments: S_1 = B_0, S_(i + 1) = S_i M_i + B_i. A block has kStartRows rows of S of a
// sequence and value head, a warp one of them.
constexpr int kStartRows = 8;

template <int K>
__global__ void __launch_bounds__(kStartRows * 32) kda_starts(const __grid_constant__ KdaArgs args) {
  constexpr int kOwn = K / 32;  // columns of a lane
  using Own = std::conditional_t<kOwn == 4, float4, float2>;
  __shared__ float row[kStartRows][K];
  grid_wait();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  ScanWork work = scan_work<kStartRows, true>(args, blockIdx.x, args.value_dim);
  const int v = work.column + warp;
  float s[kOwn] = {};
  for (work.segment = 0; work.segment < args.segments - 1; ++work.segment) {
    const float* b = work.summary<K>(args);
    const float* m = b + static_cast<int64_t>(args.value_dim) * K;
    float sum[kOwn];
    *reinterpret_cast<Own*>(sum) = reinterpret_cast<const Own*>(b + static_cast<int64_t>(v) * K)[lane];
    if (work.segment > 0) {
      *reinterpret_cast<Own*>(&row[warp][lane * kOwn]) = *reinterpret_cast<const Own*>(s);
      __syncwarp();
#pragma unroll 16
      for (int k = 0; k < K; ++k) {
        float of_m[kOwn];
        *reinterpret_cast<Own*>(of_m) = __ldg(reinterpret_cast<const Own*>(m + k * K) + lane);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) sum[i] = fmaf(row[warp][k], of_m[i], sum[i]);
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) s[i] = sum[i];
    reinterpret_cast<Own*>(work.start<K>(args, work.segment + 1) + static_cast<int64_t>(v) * K)[lane] =
        *reinterpret_cast<Own*>(s);
  }
}

}  // namespace kilin::cuda
