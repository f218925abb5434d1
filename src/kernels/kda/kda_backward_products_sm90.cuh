// SPDX-License-Identifier: Apache-2.0
// Gradients of a chunk (kda_backward_gradient_sm90.cuh): shared memory, loads and products of 64 x 64 and
// larger.
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
  static __device__ __forceinline__ void store_gate(float* to, float x) { *to = x; }
  static __device__ __forceinline__ void store_gate(__nv_bfloat16* to, float x) {
    *to = __float2bfloat16_rn(x);
  }
  static __device__ __forceinline__ void store_gate(__half* to, float x) { *to = __float2half_rn(x); }

  __device__ __forceinline__ void store_sums() const;

  // Rows of tokens: gradients of q, k and beta.
  __device__ __forceinline__ void row_gradients() const;
};

}  // namespace kilin::cuda::backward
