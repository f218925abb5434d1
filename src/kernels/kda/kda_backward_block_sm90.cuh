// SPDX-License-Identifier: Apache-2.0
// Gradients of a chunk (kda_backward_gradient_sm90.cuh): shared memory, what a thread knows, loads and norms.
#pragma once
#include "kernels/cuda/wgmma.cuh"
#include "kernels/kda/kda_backward_prepare_sm90.cuh"
#include "kernels/kda/kda_backward_sm90.cuh"

namespace kilin::cuda::backward {

template <int K, int V>
struct GradientShared {
  static constexpr int kThreads = 512;
  static constexpr int kStateParts = 8;
  static constexpr int kRawRow = K * 2 + 16;  // bytes of a row of q or k as they came
  static constexpr int kRawK = 0;
  static constexpr int kRawQ = kRawK + kChunk * kRawRow;
  // Tables, fp32
  static constexpr int kTotal = kRawQ + kChunk * kRawRow;  // [4][K] log2 decay of each sub-chunk
  static constexpr int kStateSums = kTotal + 4 * K * 4;    // [8][K] sum over an eighth of the values of S H
  static constexpr int kKeySums =
      kStateSums + kStateParts * K * 4;  // [4][K] sum over the tokens of a sub-chunk of kt dkt
  static constexpr int kSubSums =
      kKeySums + 4 * K * 4;  // [4][K] gradient of g of the first token of a sub-chunk
  static constexpr int kBiasSums = kSubSums + 4 * K * 4;      // [4][K] of dt_bias
  static constexpr int kNorms = kBiasSums + 4 * K * 4;        // [2][64] 1 / |k|, 1 / |q|
  static constexpr int kValueSums = kNorms + 2 * kChunk * 4;  // [64] v . dv
  static constexpr int kRateSums = kValueSums + kChunk * 4;   // [16] of a_log
  static constexpr int kBarrier = kRateSums + 16 * 4;         // of the bulk copies
  static constexpr int kArena = (kBarrier + 8 + 1023) / 1024 * 1024;
  // First the operands of the products ...
  static constexpr int kValueTile = kChunk * V * 2;
  static constexpr int kState = kArena;  // [K / 64][V][64], swizzled like all of them
  static constexpr int kDState = kState + V * K * 2;
  static constexpr int kA = kDState + V * K * 2;       // [64][64]
  static constexpr int kV = kA + kChunk * kChunk * 2;  // [V / 64][64][64]
  static constexpr int kDOut = kV + kValueTile;
  static constexpr int kDU = kDOut + kValueTile;
  static constexpr int kU = kDU + kValueTile;
  static constexpr int kOperandsEnd = kU + kValueTile;
  // ... then their results, fp32
  static constexpr int kLd = K + 8;   // row length of a [64][K] matrix
  static constexpr int kPairLd = 68;  // of a [64][64] matrix
  static constexpr int kDQ = kArena;  // gradients of q D, then of q
  static constexpr int kDK = kDQ + kChunk * kLd * 4;
  static constexpr int kBack = kDK + kChunk * kLd * 4;  // of kt, then of k as the earlier token of its pairs
  static constexpr int kLocal =
      kBack + kChunk * kLd * 4;  // log2 decay from the sub-chunk's start, then gradient of g
  static constexpr int kDP = kLocal + kChunk * kLd * 4;
  static constexpr int kDM = kDP + kChunk * kPairLd * 4;
  static constexpr int kResultsEnd = kDM + kChunk * kPairLd * 4;
  static constexpr int kBytes = kOperandsEnd > kResultsEnd ? kOperandsEnd : kResultsEnd;
  static_assert(kBytes <= 232448);
};

template <class Element, int K, int V, class GateElement>
struct Gradient {
  using Image = KdaImage<K>;
  using Shared = GradientShared<K, V>;
  static constexpr int kSteps = K / 16;

  const KdaGradientArgs& args;
  uint8_t* shared;
  uint32_t base;
  int64_t chunk, first;  // first token
  int head, length;      // value head
  int thread, warp, lane, g, t;

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  __device__ __forceinline__ int row(int half) const { return 16 * (warp & 3) + g + 8 * half; }
  // For ldmatrix: block (16 rows from `rows` on, columns 16 step ...) of a swizzled [.][64][64] matrix
  __device__ __forceinline__ uint32_t block_address(int matrix, int rows, int step) const {
    return base + matrix + swizzled<kChunk>(rows + (lane & 15), 2 * step + (lane >> 4));
  }

  // Rows of v or d_out into the swizzle, and of q or k as they are.
  __device__ __forceinline__ void copy_values(int place, const void* from, int64_t stride) const {
    const Element* rows = static_cast<const Element*>(from) + first * stride + static_cast<int64_t>(head) * V;
    copy_rows<Shared::kThreads, V / 8>(
        rows, stride, length, [&](int r, int piece) { return base + place + swizzled<kChunk>(r, piece); });
  }
  __device__ __forceinline__ void copy_raw(int place, const void* from, int64_t stride) const {
    const int64_t kv_head = head / (args.inputs.value_heads / args.inputs.heads);
    const Element* rows = static_cast<const Element*>(from) + first * stride + kv_head * K;
    copy_rows<Shared::kThreads, K / 8>(rows, stride, length, [&](int r, int piece) {
      return base + place + r * Shared::kRawRow + piece * 16;
    });
  }

  // Images come by bulk copies, rows by cp.async.
  __device__ __forceinline__ void load() const {
    const int64_t index = chunk * args.inputs.value_heads + head;
    const uint32_t barrier = base + Shared::kBarrier;
    if (thread == 0) {
      constexpr int kStateBytes = V * K * 2;
      barrier_init(barrier, 1);
      barrier_init_fence();
      barrier_arrive_expect(barrier, Image::kSquare + 2 * Shared::kValueTile + 2 * kStateBytes);
      bulk_load(base + Shared::kState, args.states + index * kStateBytes, kStateBytes, barrier);
      bulk_load(base + Shared::kDState, args.d_states + index * kStateBytes, kStateBytes, barrier);
      bulk_load(base + Shared::kA, args.inputs.images + index * Image::kBytes + Image::kA, Image::kSquare,
                barrier);
      bulk_load(base + Shared::kU, args.u + index * Shared::kValueTile, Shared::kValueTile, barrier);
      bulk_load(base + Shared::kDU, args.d_u + index * Shared::kValueTile, Shared::kValueTile, barrier);
    }
    copy_values(Shared::kV, args.v, args.v_stride);
    copy_values(Shared::kDOut, args.d_out, args.d_out_stride);
    copy_raw(Shared::kRawK, args.inputs.k, args.inputs.k_stride);
    copy_raw(Shared::kRawQ, args.inputs.q, args.inputs.q_stride);
    copy_commit();
    // the gates come later: into the second-level cache with them
    constexpr int kLines = (K * static_cast<int>(sizeof(GateElement)) + 127) / 128;
    if (thread < kChunk * kLines && thread / kLines < length) {
      const GateElement* gate = static_cast<const GateElement*>(args.inputs.gate) +
                                (first + thread / kLines) * args.inputs.gate_stride +
                                static_cast<int64_t>(head) * K;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(gate + thread % kLines * (128 / sizeof(GateElement))));
    }
    copy_wait<0>();
    async_proxy_fence();
    __syncthreads();
    barrier_wait(barrier, 0);
  }

  __device__ __forceinline__ float raw(int place, int token, int channel) const {
    return static_cast<float>(
        *reinterpret_cast<const Element*>(shared + place + token * Shared::kRawRow + channel * 2));
  }
  __device__ __forceinline__ float key(int token, int channel) const {
    return raw(Shared::kRawK, token, channel) * floats(Shared::kNorms)[token];
  }
  __device__ __forceinline__ float query(int token, int channel) const {
    return raw(Shared::kRawQ, token, channel) * floats(Shared::kNorms)[kChunk + token];
  }

  // 1 / |k| and scale / |q| of each row, and the sums over values of S H.
  __device__ __forceinline__ void norms_and_state_sums() const {
    for (int r = warp; r < kChunk; r += Shared::kThreads / 32) {
      float kk = 0.0f, qq = 0.0f;
#pragma unroll
      for (int i = 0; i < K / 32; ++i) {
        const float k = raw(Shared::kRawK, r, lane + 32 * i), q = raw(Shared::kRawQ, r, lane + 32 * i);
        kk = fmaf(k, k, kk);
        qq = fmaf(q, q, qq);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) {
        kk += __shfl_xor_sync(~0u, kk, d);
        qq += __shfl_xor_sync(~0u, qq, d);
      }
      if (lane == 0) {
        floats(Shared::kNorms)[r] = args.inputs.l2norm ? rsqrtf(kk + 1e-6f) : 1.0f;
        floats(Shared::kNorms)[kChunk + r] =
            (args.inputs.l2norm ? rsqrtf(qq + 1e-6f) : 1.0f) * args.inputs.scale;
      }
    }
    constexpr int kPairs = K / 2, kParts = Shared::kStateParts;
    if (thread < kPairs * kParts) {
      const int pair = thread % kPairs, part = thread / kPairs;
      const uint32_t block = (pair >> 5) * (V * 128);
      float2 sum = {0.0f, 0.0f};
#pragma unroll 4
      for (int r = part * (V / kParts); r < (part + 1) * (V / kParts); ++r) {
        const uint32_t place = block + r * 128 + ((((pair >> 2) & 7) ^ (r & 7)) << 4) + (pair & 3) * 4;
        const float2 s = unpack<Element>(*reinterpret_cast<const uint32_t*>(shared + Shared::kState + place));
        const float2 h =
            unpack<Element>(*reinterpret_cast<const uint32_t*>(shared + Shared::kDState + place));
        sum.x = fmaf(s.x, h.x, sum.x);
        sum.y = fmaf(s.y, h.y, sum.y);
      }
      *reinterpret_cast<float2*>(floats(Shared::kStateSums) + part * K + 2 * pair) = sum;
    }
  }

  // Accumulators of this warp's 16 rows as A operands of steps of 16 columns.
  template <int N>
  static __device__ __forceinline__ void pack_rows(const float (&d)[4 * N], uint32_t (&a)[N / 2][4]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pack_operand<Element>(d + 8 * i, a[i]);
  }

  template <int N>
  __device__ __forceinline__ void store_rows(int place, int ld, const float (&d)[4 * N], float factor) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(floats(place) + row(h) * ld + 8 * n + 2 * t) = {
            d[4 * n + 2 * h] * factor, d[4 * n + 2 * h + 1] * factor};
      }
    }
  }

  // The lower triangle of a [64][64] matrix, with or without its diagonal; zeros above.
  __device__ __forceinline__ void store_pairs(int place, const float (&d)[32], float factor,
                                              int diagonal) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = 8 * n + 2 * t;
        *reinterpret_cast<float2*>(floats(place) + row(h) * Shared::kPairLd + column) = {
            column + diagonal <= row(h) ? d[4 * n + 2 * h] * factor : 0.0f,
            column + 1 + diagonal <= row(h) ? d[4 * n + 2 * h + 1] * factor : 0.0f};
      }
    }
  }

  // B operands: a matrix stored [k][64 n] with `bytes` between blocks of 64 columns, or [n][64 k].
  __device__ __forceinline__ uint64_t columns_of(int place, int bytes) const {
    return swizzled_matrix(base + place, bytes, 1024);
  }
  __device__ __forceinline__ uint64_t rows_of(int place) const {
    return swizzled_matrix(base + place, 16, 1024);
  }

  __device__ __forceinline__ void load_rows(int matrix, uint32_t (&a)[V / 16][4]) const {
#pragma unroll
    for (int i = 0; i < V / 16; ++i) ldmatrix(a[i], block_address(matrix, 16 * (warp & 3), i));
  }
  // d = a U^T
  __device__ __forceinline__ void times_u(float (&d)[32], const uint32_t (&a)[V / 16][4]) const {
#pragma unroll
    for (int i = 0; i < V / 16; ++i)
      wgmma<Element, 0>(d, a[i], rows_of(Shared::kU) + (i / 4) * 512 + (i % 4) * 2, i > 0);
  }
  // 64 channels of d = a S or a H
  __device__ __forceinline__ void times_state(float (&d)[32], const uint32_t (&a)[V / 16][4], int state,
                                              int half) const {
#pragma unroll
    for (int i = 0; i < V / 16; ++i)
      wgmma<Element, 1>(d, a[i], columns_of(state + half * V * 128, V * 128) + i * 128, i > 0);
  }
  __device__ __forceinline__ void finish() const {
    wgmma_commit();
    wgmma_wait<0>();
  }
  __device__ __forceinline__ void store_half(int place, const float (&d)[32], float factor, int half) const {
    store_rows<8>(place + half * 256, Shared::kLd, d, factor);
  }
  // Behind it nobody reads the operands of the products any more: their place is that of the results.
  __device__ __forceinline__ void operands_read() const { named_barrier(2, Shared::kThreads); }

  // dv = A^T dU of this warp's rows, fp32 and as A operands.
  __device__ __forceinline__ void make_dv(float (&dv)[V / 2], uint32_t (&packed)[V / 16][4]) const;
  // dv on its way out, and v . dv of each row.
  __device__ __forceinline__ void value_gradients(const float (&dv)[V / 2],
                                                  const uint32_t (&packed)[V / 16][4]) const;
  // dP, dM, and the gradients of q D, k D and kt.
  __device__ __forceinline__ void products() const;

  struct Channel {
    float bias, rate;
  };
  __device__ __forceinline__ Channel channel_of(int channel) const {
    const KdaPrepareArgs& in = args.inputs;
    return {in.dt_bias != nullptr ? __ldg(in.dt_bias + head * K + channel) : 0.0f, gate_speed(in, head)};
  }
  __device__ __forceinline__ float raw_gate(int token, int channel) const {
    if (token >= length) return 0.0f;
    return static_cast<float>(static_cast<const GateElement*>(
        args.inputs
            .gate)[(first + token) * args.inputs.gate_stride + static_cast<int64_t>(head) * K + channel]);
  }

  // Calls body(sub-chunk, channel) for all of them, one thread each.
  template <class Body>
  __device__ __forceinline__ void each_channel(Body body) const {
    if (thread < 4 * K) body(thread / K, thread % K);
  }

  // Cumulative gates of each sub-chunk, and sum_j kt_j dkt_j relative to its end.
  __device__ __forceinline__ void cumulative_gates() const;

  // log2 decay of the sub-chunks from `from` to `to` - 1
  __device__ __forceinline__ float between(int from, int to, int channel) const {
    float sum = 0.0f;
    for (int s = from; s < to; ++s) sum += floats(Shared::kTotal)[s * K + channel];
    return sum;
  }

  // Pairs of tokens in different sub-chunks. A warp has kN times 8 channels.
  __device__ __forceinline__ void pairs_between() const;

  // Pairs of tokens in the same sub-chunk, and the gradient of g within the sub-chunk.
  __device__ __forceinline__ void pairs_within() const;
  // A decay of about 2^-24 or less (a token's is cut there).
  static __device__ __forceinline__ bool is_cut(float decay) { return decay <= 6.2e-8f; }
  // The lowest bit of a sum tells whether the token or the sub-chunk lets gradients of later ones pass.
  static __device__ __forceinline__ float pass_marked(float x, bool open) {
    return __uint_as_float((__float_as_uint(x) & ~1u) | (open ? 1u : 0u));
  }
  static __device__ __forceinline__ bool passes(float x) { return (__float_as_uint(x) & 1u) != 0; }

  // Gradients of the raw gates, and this chunk's share of those of dt_bias and a_log.
  __device__ __forceinline__ void gate_gradients() const;
  __device__ __forceinline__ void store_sums() const;

  // Rows of tokens: gradients of q, k and beta.
  __device__ __forceinline__ void row_gradients() const;
};

}  // namespace kilin::cuda::backward
