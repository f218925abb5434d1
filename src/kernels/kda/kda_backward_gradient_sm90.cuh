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

// A gate with its derivatives, of a raw value x with its bias: log2 of the decay as log2_decay() makes it but
// not yet cut, and dg/dx and dg/dA_log of its natural logarithm. Without branches, so that tokens overlap.
struct GateSlopes {
  float log2, by_x, by_a_log;
};
__device__ __forceinline__ GateSlopes gate_slopes(KdaGate kind, float x, float rate, float lower_bound) {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
  const bool bounded = kind == KdaGate::kBounded, none = kind == KdaGate::kNone;
  const float z = (bounded ? rate * x : x) * kLog2e;
  const float e = fast_exp2(-fabsf(z));
  const float inverse = fast_reciprocal(1.0f + e);
  const float sigmoid = z < 0.0f ? e * inverse : inverse;
  const float series = kLog2e * e * (1.0f - e * (0.5f - e * (0.33333333f - 0.25f * e)));
  const float tail = e < 0.0625f ? series : fast_log2(1.0f + e);
  const float soft = -rate * (fmaxf(z, 0.0f) + tail);
  const float bounded_slope = lower_bound * e * inverse * inverse * rate;
  GateSlopes result;
  result.log2 = none ? z : (bounded ? lower_bound * kLog2e * sigmoid : soft);
  result.by_x = none ? 1.0f : (bounded ? bounded_slope : -rate * sigmoid);
  result.by_a_log = none ? 0.0f : (bounded ? bounded_slope * x : soft * kLn2);
  return result;
}

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
    return base + matrix + swizzled(rows + (lane & 15), 2 * step + (lane >> 4));
  }

  // rows of a matrix of 16-bit values, `pieces` of 16 bytes each, behind `valid` zeros
  __device__ __forceinline__ void copy_tokens(int place, const void* from, int64_t stride, int64_t column,
                                              int pieces) const {
    const Element* rows = static_cast<const Element*>(from) + first * stride + column;
    for (int i = thread; i < kChunk * pieces; i += Shared::kThreads) {
      const int r = i / pieces, piece = i % pieces;
      copy_16_async(base + place + swizzled(r, piece), rows + (r < length ? r * stride : 0) + piece * 8,
                    r < length);
    }
  }

  __device__ __forceinline__ void copy_raw(int place, const void* from, int64_t stride,
                                           int64_t column) const {
    const Element* rows = static_cast<const Element*>(from) + first * stride + column;
    constexpr int kPieces = K / 8;
    for (int i = thread; i < kChunk * kPieces; i += Shared::kThreads) {
      const int r = i / kPieces, piece = i % kPieces;
      copy_16_async(base + place + r * Shared::kRawRow + piece * 16,
                    rows + (r < length ? r * stride : 0) + piece * 8, r < length);
    }
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
    copy_tokens(Shared::kV, args.v, args.v_stride, static_cast<int64_t>(head) * V, V / 8);
    copy_tokens(Shared::kDOut, args.d_out, args.d_out_stride, static_cast<int64_t>(head) * V, V / 8);
    const int64_t kv_head = head / (args.inputs.value_heads / args.inputs.heads);
    copy_raw(Shared::kRawK, args.inputs.k, args.inputs.k_stride, kv_head * K);
    copy_raw(Shared::kRawQ, args.inputs.q, args.inputs.q_stride, kv_head * K);
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
    return to_float(
        *reinterpret_cast<const Element*>(shared + place + token * Shared::kRawRow + channel * 2));
  }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
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
    for (int i = 0; i < N / 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = pack<Element>(d[8 * i + 2 * j], d[8 * i + 2 * j + 1]);
    }
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
  // dv = A^T dU of this warp's rows, fp32 and as A operands
  __device__ __forceinline__ void make_dv(float (&dv)[V / 2], uint32_t (&packed)[V / 16][4]) const {
    uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * i + (lane & 7) + 8 * (lane >> 4);
      ldmatrix_trans(a[i], base + Shared::kA + swizzled(token, 2 * (warp & 3) + ((lane >> 3) & 1)));
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma<Element, 1>(dv, a[i], columns_of(Shared::kDU, 8192) + i * 128, i > 0);
    finish();
    pack_rows<V / 8>(dv, packed);
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

  // The products, shared among the warpgroups: dP, d(q D) | d(q D), dkt | dv, dM, d(k D) | dv again, d(k D),
  // dkt. With K = 64 the halves of 64 channels are all there is.
  __device__ __forceinline__ void products() const {
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

  // dv on its way out, and v . dv of each row.
  __device__ __forceinline__ void value_gradients(const float (&dv)[V / 2],
                                                  const uint32_t (&packed)[V / 16][4]) const {
    float sum[2] = {0.0f, 0.0f};
    Element* to =
        static_cast<Element*>(args.d_v) + first * args.d_v_stride + static_cast<int64_t>(head) * V + 2 * t;
#pragma unroll
    for (int i = 0; i < V / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = 2 * i + (j >> 1), h = j & 1;
        const float2 v = unpack<Element>(
            *reinterpret_cast<const uint32_t*>(shared + Shared::kV + swizzled(row(h), n) + 4 * t));
        sum[h] = fmaf(v.x, dv[8 * i + 2 * j], fmaf(v.y, dv[8 * i + 2 * j + 1], sum[h]));
        if (args.d_v != nullptr && row(h) < length)
          *reinterpret_cast<uint32_t*>(to + row(h) * args.d_v_stride + 8 * n) = packed[i][j];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      if (t == 0) floats(Shared::kValueSums)[row(h)] = sum[h];
    }
  }

  struct Channel {
    float bias, rate;
  };
  __device__ __forceinline__ Channel channel_of(int channel) const {
    const KdaPrepareArgs& in = args.inputs;
    return {in.dt_bias != nullptr ? __ldg(in.dt_bias + head * K + channel) : 0.0f,
            in.a_log != nullptr && in.gate_kind != KdaGate::kNone ? __expf(in.a_log[head]) : 1.0f};
  }
  __device__ __forceinline__ float raw_gate(int token, int channel) const {
    if (token >= length) return 0.0f;
    const GateElement x = static_cast<const GateElement*>(
        args.inputs
            .gate)[(first + token) * args.inputs.gate_stride + static_cast<int64_t>(head) * K + channel];
    if constexpr (sizeof(GateElement) == 4) {
      return x;
    } else {
      return to_float(x);
    }
  }

  // Calls body(sub-chunk, channel) for all of them, one thread each.
  template <class Body>
  __device__ __forceinline__ void each_channel(Body body) const {
    if (thread < 4 * K) body(thread / K, thread % K);
  }

  // Cumulative gates of each sub-chunk, and sum_j kt_j dkt_j relative to its end.
  __device__ __forceinline__ void cumulative_gates() const {
    each_channel([&](int s, int channel) {
      const Channel c = channel_of(channel);
      float sum = 0.0f, keys = 0.0f;
      float x[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = raw_gate(16 * s + i, channel);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int token = 16 * s + i;
        const GateSlopes gate =
            gate_slopes(args.inputs.gate_kind, x[i] + c.bias, c.rate, args.inputs.lower_bound);
        const float y = token < length ? fmaxf(gate.log2, -24.0f) : 0.0f;
        sum += y;
        floats(Shared::kLocal)[token * Shared::kLd + channel] = sum;
        keys = fmaf(keys, fast_exp2(y),
                    key(token, channel) * floats(Shared::kBack)[token * Shared::kLd + channel]);
      }
      floats(Shared::kTotal)[s * K + channel] = sum;
      floats(Shared::kKeySums)[s * K + channel] = keys;
    });
  }

  // log2 decay of the sub-chunks from `from` to `to` - 1
  __device__ __forceinline__ float between(int from, int to, int channel) const {
    float sum = 0.0f;
    for (int s = from; s < to; ++s) sum += floats(Shared::kTotal)[s * K + channel];
    return sum;
  }

  // Pairs of tokens in different sub-chunks. A warp has kN times 8 channels.
  __device__ __forceinline__ void pairs_between() const {
    constexpr int kN = 1;
    const int channel0 = warp * 8 * kN;
    if (channel0 >= K) return;
    const float* dp = floats(Shared::kDP);
    const float* dm = floats(Shared::kDM);
    const auto element = [&](const float* x, int i, int j) { return round_tf32(x[i * Shared::kPairLd + j]); };
    const auto local = [&](int token, int channel) {
      return floats(Shared::kLocal)[token * Shared::kLd + channel];
    };
    // The columns' factors of accumulators, 2^log[channel]
    const auto scale_columns = [&](float(&d)[kN][4], const float(&factor)[kN][2]) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[n][i] *= factor[n][i & 1];
      }
    };
    const auto total_factor = [&](int s, float(&factor)[kN][2]) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          factor[n][e] = fast_exp2(floats(Shared::kTotal)[s * K + channel0 + 8 * n + 2 * t + e]);
      }
    };
    const auto add_to = [&](int place, int s, const float(&d)[kN][4], bool before) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int channel = channel0 + 8 * n + 2 * t + e;
          const float factor = fast_exp2(before ? between(0, s, channel) : between(s + 1, 4, channel));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float* x = floats(place) + (16 * s + g + 8 * h) * Shared::kLd + channel;
            *x = fmaf(*x, factor, d[n][2 * h + e]);
          }
        }
      }
    };
    {
      float by_p[3][kN][4] = {}, by_m[3][kN][4] = {};  // of sub-chunks 1 to 3
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        float factor[kN][2];
        total_factor(j, factor);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i < j || j == 0) continue;
          scale_columns(by_p[i], factor);
          scale_columns(by_m[i], factor);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float b[kN][2];
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            const int channel = channel0 + 8 * n + g;
            const float end = floats(Shared::kTotal)[j * K + channel];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int token = 16 * j + 8 * k + t + 4 * e;
              b[n][e] = round_tf32(key(token, channel) * fast_exp2(end - local(token, channel)));
            }
          }
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            if (i < j) continue;
            const int r = 16 * (i + 1) + g, c = 16 * j + 8 * k + t;
            const float p0 = element(dp, r, c), p1 = element(dp, r + 8, c);
            const float p2 = element(dp, r, c + 4), p3 = element(dp, r + 8, c + 4);
            const float m0 = element(dm, r, c), m1 = element(dm, r + 8, c);
            const float m2 = element(dm, r, c + 4), m3 = element(dm, r + 8, c + 4);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
              mma_tf32(by_p[i][n], p0, p1, p2, p3, b[n][0], b[n][1]);
              mma_tf32(by_m[i][n], m0, m1, m2, m3, b[n][0], b[n][1]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        add_to(Shared::kDQ, i + 1, by_p[i], true);
        add_to(Shared::kDK, i + 1, by_m[i], true);
      }
    }
    float back[3][kN][4] = {};  // of sub-chunks 0 to 2
#pragma unroll
    for (int i = 3; i > 0; --i) {
      float factor[kN][2];
      total_factor(i, factor);
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (j < i && i < 3) scale_columns(back[j], factor);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float b[kN][2][2];  // of q and k
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const int channel = channel0 + 8 * n + g;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = 16 * i + 8 * k + t + 4 * e;
            const float up = fast_exp2(local(token, channel));
            b[n][0][e] = round_tf32(query(token, channel) * up);
            b[n][1][e] = round_tf32(key(token, channel) * up);
          }
        }
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          if (j >= i) continue;
          const int r = 16 * i + 8 * k + t, c = 16 * j + g;
          const float p0 = element(dp, r, c), p1 = element(dp, r, c + 8);
          const float p2 = element(dp, r + 4, c), p3 = element(dp, r + 4, c + 8);
          const float m0 = element(dm, r, c), m1 = element(dm, r, c + 8);
          const float m2 = element(dm, r + 4, c), m3 = element(dm, r + 4, c + 8);
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            mma_tf32(back[j][n], p0, p1, p2, p3, b[n][0][0], b[n][0][1]);
            mma_tf32(back[j][n], m0, m1, m2, m3, b[n][1][0], b[n][1][1]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) add_to(Shared::kBack, j, back[j], false);
  }

  // Pairs of tokens in the same sub-chunk, and the gradient of g within the sub-chunk.
  __device__ __forceinline__ void pairs_within() const {
    each_channel([&](int s, int channel) {
      float* dq_column = floats(Shared::kDQ) + 16 * s * Shared::kLd + channel;
      float* dk_column = floats(Shared::kDK) + 16 * s * Shared::kLd + channel;
      float* back_column = floats(Shared::kBack) + 16 * s * Shared::kLd + channel;
      float* local_column = floats(Shared::kLocal) + 16 * s * Shared::kLd + channel;
      const float* dp = floats(Shared::kDP) + 16 * s * Shared::kPairLd + 16 * s;
      const float* dm = floats(Shared::kDM) + 16 * s * Shared::kPairLd + 16 * s;
      float decay[16], keys[16];
      float prefix = 1.0f, before = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float sum = local_column[i * Shared::kLd];
        decay[i] = fast_exp2(sum - before);
        before = sum;
        prefix *= decay[i];
        float by_p = 0.0f, by_m = 0.0f;
#pragma unroll
        for (int j4 = 0; j4 < i; j4 += 4) {
          const float4 p = *reinterpret_cast<const float4*>(dp + i * Shared::kPairLd + j4);
          const float4 m = *reinterpret_cast<const float4*>(dm + i * Shared::kPairLd + j4);
          const float ps[4] = {p.x, p.y, p.z, p.w}, ms[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
          for (int j = j4; j < j4 + 4; ++j) {
            if (j >= i) continue;
            keys[j] *= decay[i];
            by_p = fmaf(ps[j - j4], keys[j], by_p);
            by_m = fmaf(ms[j - j4], keys[j], by_m);
          }
        }
        keys[i] = key(16 * s + i, channel);
        by_p = fmaf(dp[i * Shared::kPairLd + i], keys[i], by_p);
        dq_column[i * Shared::kLd] = fmaf(dq_column[i * Shared::kLd], prefix, by_p);
        dk_column[i * Shared::kLd] = fmaf(dk_column[i * Shared::kLd], prefix, by_m);
      }
      float later[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) later[i] = back_column[i * Shared::kLd];
      float sum = 0.0f, next = 1.0f;
#pragma unroll
      for (int i = 15; i >= 0; --i) {
        const float k = key(16 * s + i, channel), q = query(16 * s + i, channel);
#pragma unroll
        for (int j4 = 0; j4 <= i; j4 += 4) {
          const float4 p = *reinterpret_cast<const float4*>(dp + i * Shared::kPairLd + j4);
          const float4 m = *reinterpret_cast<const float4*>(dm + i * Shared::kPairLd + j4);
          const float ps[4] = {p.x, p.y, p.z, p.w}, ms[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
          for (int j = j4; j < j4 + 4; ++j) {
            if (j > i) continue;
            later[j] = fmaf(later[j], next, fmaf(ps[j - j4], q, ms[j - j4] * k));
          }
        }
        next = decay[i];
        const float dk = dk_column[i * Shared::kLd], dq = dq_column[i * Shared::kLd];
        sum = fmaf(q, dq, fmaf(k, dk - later[i], sum));
        // a decay at its lower bound: what lies before has no influence, and rounding errors must not pass.
        // The mark tells gate_gradients(): two comparisons that differ in rounding would leave half of a sum.
        const bool cut = is_cut(decay[i]);
        if (cut) sum = 0.0f;
        local_column[i * Shared::kLd] = pass_marked(sum, !cut);
        back_column[i * Shared::kLd] = later[i];
      }
      floats(Shared::kSubSums)[s * K + channel] = sum;
      bool open = true;
#pragma unroll
      for (int i = 0; i < 16; ++i) open &= !is_cut(decay[i]);
      floats(Shared::kKeySums)[s * K + channel] =
          pass_marked(floats(Shared::kKeySums)[s * K + channel], open);
    });
  }
  // A decay of about 2^-24 or less (a token's is cut there).
  static __device__ __forceinline__ bool is_cut(float decay) { return decay <= 6.2e-8f; }
  // The lowest bit of a sum tells whether the token or the sub-chunk lets gradients of later ones pass.
  static __device__ __forceinline__ float pass_marked(float x, bool open) {
    return __uint_as_float((__float_as_uint(x) & ~1u) | (open ? 1u : 0u));
  }
  static __device__ __forceinline__ bool passes(float x) { return (__float_as_uint(x) & 1u) != 0; }

  // Gradients of the raw gates, and this chunk's share of those of dt_bias and a_log.
  __device__ __forceinline__ void gate_gradients() const {
    float rate_sum = 0.0f;
    each_channel([&](int s, int channel) {
      const Channel c = channel_of(channel);
      float carry = 0.0f;
#pragma unroll
      for (int part = 0; part < Shared::kStateParts; ++part)
        carry += floats(Shared::kStateSums)[part * K + channel];
      carry *= fast_exp2(between(0, 4, channel));
#pragma unroll
      for (int r = 0; r < 4; ++r)
        carry = fmaf(floats(Shared::kKeySums)[r * K + channel], fast_exp2(between(r + 1, 4, channel)), carry);
      for (int r = 3; r > s; --r) {
        const float sum = floats(Shared::kSubSums)[r * K + channel];
        carry = passes(floats(Shared::kKeySums)[r * K + channel]) ? sum + carry : sum;
      }
      float bias_sum = 0.0f;
      GateElement* to = args.d_gate == nullptr
                            ? nullptr
                            : static_cast<GateElement*>(args.d_gate) + first * args.d_gate_stride +
                                  static_cast<int64_t>(head) * K + channel;
      float x[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = raw_gate(16 * s + i, channel);
#pragma unroll
      for (int i = 15; i >= 0; --i) {
        const int token = 16 * s + i;
        const GateSlopes gate =
            gate_slopes(args.inputs.gate_kind, x[i] + c.bias, c.rate, args.inputs.lower_bound);
        const float local = floats(Shared::kLocal)[token * Shared::kLd + channel];
        const bool cut = !passes(local) && token < length;
        carry = cut ? 0.0f : carry;
        const float dg = cut || token >= length ? 0.0f : local + carry;
        const float dx = dg == 0.0f ? 0.0f : dg * gate.by_x;
        bias_sum += dx;
        rate_sum += dg == 0.0f ? 0.0f : dg * gate.by_a_log;
        if (to != nullptr && token < length) store_gate(to + token * args.d_gate_stride, dx);
      }
      floats(Shared::kBiasSums)[s * K + channel] = bias_sum;
    });
#pragma unroll
    for (int d = 16; d > 0; d /= 2) rate_sum += __shfl_xor_sync(~0u, rate_sum, d);
    if (lane == 0) floats(Shared::kRateSums)[warp] = rate_sum;
  }
  static __device__ __forceinline__ void store_gate(float* to, float x) { *to = x; }
  static __device__ __forceinline__ void store_gate(__nv_bfloat16* to, float x) {
    *to = __float2bfloat16_rn(x);
  }
  static __device__ __forceinline__ void store_gate(__half* to, float x) { *to = __float2half_rn(x); }

  __device__ __forceinline__ void store_sums() const {
    float* to = args.sums + (chunk * args.inputs.value_heads + head) * (1 + K);
    if (thread < K) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < 4; ++s) sum += floats(Shared::kBiasSums)[s * K + thread];
      to[1 + thread] = sum;
    } else if (thread == K) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Shared::kThreads / 32; ++w) sum += floats(Shared::kRateSums)[w];
      to[0] = sum;
    }
  }

  // Rows of tokens: gradients of q, k and beta.
  __device__ __forceinline__ void row_gradients() const {
    const KdaPrepareArgs& in = args.inputs;
    for (int r = warp; r < length; r += Shared::kThreads / 32) {
      float dq[K / 32], dk[K / 32];
      float along_q = 0.0f, along_k = 0.0f, by_beta = 0.0f;
      const float k_norm = floats(Shared::kNorms)[r];
#pragma unroll
      for (int i = 0; i < K / 32; ++i) {
        const int channel = lane + 32 * i;
        const int at = r * Shared::kLd + channel;
        const float k = raw(Shared::kRawK, r, channel), q = raw(Shared::kRawQ, r, channel);
        const float forward = floats(Shared::kDK)[at];
        dq[i] = floats(Shared::kDQ)[at];
        dk[i] = forward + floats(Shared::kBack)[at];
        along_q = fmaf(q, dq[i], along_q);
        along_k = fmaf(k, dk[i], along_k);
        by_beta = fmaf(k, forward, by_beta);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) {
        along_q += __shfl_xor_sync(~0u, along_q, d);
        along_k += __shfl_xor_sync(~0u, along_k, d);
        by_beta += __shfl_xor_sync(~0u, by_beta, d);
      }
      // y = x r: dx = r (dy - x (x . dy) r^2); q has its scale as well
      const float q_factor = floats(Shared::kNorms)[kChunk + r];
      const float q_norm = in.scale != 0.0f ? q_factor / in.scale : 0.0f;
      const float q_along = in.l2norm ? along_q * q_norm * q_norm : 0.0f;
      const float k_along = in.l2norm ? along_k * k_norm * k_norm : 0.0f;
      const int64_t token = first + r;
      const int64_t kv_head = head / (in.value_heads / in.heads);
#pragma unroll
      for (int i = 0; i < K / 32; ++i) {
        const int channel = lane + 32 * i;
        const float q = q_factor * (dq[i] - raw(Shared::kRawQ, r, channel) * q_along);
        const float k = k_norm * (dk[i] - raw(Shared::kRawK, r, channel) * k_along);
        if (args.wide_keys) {
          const int64_t at = (token * in.value_heads + head) * K + channel;
          static_cast<float*>(args.d_q)[at] = q;
          static_cast<float*>(args.d_k)[at] = k;
        } else {
          if (args.d_q != nullptr)
            store_gate(static_cast<Element*>(args.d_q) + token * args.d_q_stride + kv_head * K + channel, q);
          if (args.d_k != nullptr)
            store_gate(static_cast<Element*>(args.d_k) + token * args.d_k_stride + kv_head * K + channel, k);
        }
      }
      if (lane == 0 && args.d_beta != nullptr) {
        const float sum = fmaf(by_beta, k_norm, floats(Shared::kValueSums)[r]);  // beta dbeta
        const float x = load_float(in.beta, in.beta_type, token * in.beta_stride + head);
        const float d = in.beta_is_logit ? sum / (1.0f + __expf(x)) : sum / x;
        store_float(args.d_beta, args.d_beta_type, token * args.d_beta_stride + head, d);
      }
    }
  }
};

template <class Element, int K, int V, class GateElement>
__global__ void __launch_bounds__(512, 1) kda_gradient(const __grid_constant__ KdaGradientArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int head = blockIdx.x % args.inputs.value_heads;
  const int64_t chunk = blockIdx.x / args.inputs.value_heads;
  int64_t first;
  int length;
  if (!locate_chunk(args.layout, chunk, first, length)) return;
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
