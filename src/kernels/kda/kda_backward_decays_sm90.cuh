// SPDX-License-Identifier: Apache-2.0
// First stage of the gradients (kda_backward_prepare_sm90.cuh): loads, norms, decays, L and P.
#pragma once
#include "kernels/kda/kda_backward_sm90.cuh"

namespace kilin::cuda::backward {

template <int K>
struct PrepareShared {
  using Image = KdaImage<K>;
  // The image's places serve earlier steps: minus w holds the raw gate, then k 2^G; P and A hold the columns
  // of the off-diagonal blocks.
  static constexpr int kColumns = Image::kP;  // [4][K / 16][32 lanes][16 bytes], fp16
  static constexpr int kBlocks =
      (Image::kBytes + 127) / 128 * 128;  // [10][16][kBlockLd] fp32: A, lower blocks
  static constexpr int kBlockLd = 20;
  static constexpr int kTables = kBlocks;              // before the blocks are there:
  static constexpr int kTotal = kTables;               // [4][K] log2 decay of each sub-chunk
  static constexpr int kBefore = kTotal + 4 * K * 4;   // [4][K] 2^(start of sub-chunk)
  static constexpr int kAfter = kBefore + 4 * K * 4;   // [4][K] 2^(G_C - end of sub-chunk)
  static constexpr int kBetween = kAfter + 4 * K * 4;  // [3][K] fp16: sub-chunks 1, 2, 1 and 2
  static constexpr int kBlocksBytes = 10 * 16 * kBlockLd * 4;
  static constexpr int kTablesBytes = 12 * K * 4 + 3 * K * 2;
  static constexpr int kBeta =
      kBlocks + (kBlocksBytes > kTablesBytes ? kBlocksBytes : kTablesBytes);  // [64] fp32
  static constexpr int kBytes = kBeta + kChunk * 4;
};

// log2 of the decay of one token, at least -24.
__device__ __forceinline__ float log2_decay(KdaGate kind, float x, float bias, float rate,
                                            float lower_bound) {
  constexpr float kLog2e = 1.44269504f;
  float y;
  if (kind == KdaGate::kSoftplus) {
    // -rate log2(1 + e^x) = -rate (max(z, 0) + log2(1 + 2^-|z|)), z = x log2 e. Small terms by their series:
    // what 1 + 2^-|z| loses would add up over a long, slow decay.
    const float z = (x + bias) * kLog2e;
    const float e = fast_exp2(-fabsf(z));
    const float series = kLog2e * e * (1.0f - e * (0.5f - e * (0.33333333f - 0.25f * e)));
    const float tail = e < 0.0625f ? series : fast_log2(1.0f + e);
    y = -rate * (fmaxf(z, 0.0f) + tail);
  } else if (kind == KdaGate::kBounded) {
    y = lower_bound * kLog2e * fast_reciprocal(1.0f + fast_exp2(-rate * kLog2e * (x + bias)));
  } else {
    y = x * kLog2e;
  }
  return fmaxf(y, -24.0f);
}

__device__ __forceinline__ float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// State of one thread of kda_prepare; the steps in the order in which they are called.
template <class Element, int K, class GateElement>
struct Prepare {
  using Image = KdaImage<K>;
  using Shared = PrepareShared<K>;
  static constexpr int kSteps = K / 16;  // of 16 channels

  const KdaPrepareArgs& args;
  uint8_t* shared;
  uint32_t base;     // the same as an address
  int head, length;  // value head, tokens of this chunk
  int64_t first;     // token
  int warp, lane, g, t;
  uint32_t row_piece;  // offset of this lane's row for ldmatrix, without the piece
  float row_beta[2];   // of rows g and g + 8
  float l[4][2][4];    // L of this warp's rows, [sub-chunk][8 columns][registers]; [3] is the diagonal block
  float p[4][2][4];    // q k^T alike

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  __device__ __forceinline__ int row(int half) const { return 16 * warp + g + 8 * half; }
  // Address for ldmatrix of the 16 x 16 block (rows of sub-chunk, columns 16 step ...) of a swizzled matrix.
  __device__ __forceinline__ uint32_t block_address(int matrix, int sub_chunk, int step) const {
    const int r = 16 * sub_chunk + (lane & 15);
    return base + matrix + swizzled(r, 2 * step + (lane >> 4));
  }
  // Address of the pair of elements (row of half, columns 16 step + 8 n + 2t) of a swizzled matrix.
  __device__ __forceinline__ uint32_t pair_address(int matrix, int half, int step, int n) const {
    return base + matrix + swizzled(row(half), 2 * step + n) + 4 * t;
  }

  __device__ __forceinline__ void load() {
    const int kv_head = head / (args.value_heads / args.heads);
    const auto copy = [&](int matrix, const void* from, int64_t stride, int column) {
      const Element* rows = static_cast<const Element*>(from) + first * stride + column;
      constexpr int kPieces = K / 8;
#pragma unroll 4
      for (int i = threadIdx.x; i < kChunk * kPieces; i += 128) {
        const int r = i / kPieces, piece = i % kPieces;
        copy_16_async(base + matrix + swizzled(r, piece), rows + (r < length ? r * stride : 0) + piece * 8,
                      r < length);
      }
    };
    if constexpr (sizeof(GateElement) == 2) copy(Image::kMinusW, args.gate, args.gate_stride, head * K);
    copy(Image::kK, args.k, args.k_stride, kv_head * K);
    copy(Image::kQ, args.q, args.q_stride, kv_head * K);
    copy_commit();
    if (threadIdx.x < kChunk) {
      float beta = 0.0f;
      if (threadIdx.x < length) {
        beta = load_float(args.beta, args.beta_type, (first + threadIdx.x) * args.beta_stride + head);
        if (args.beta_is_logit) beta = 1.0f / (1.0f + __expf(-beta));
        beta *= args.beta_scale;
      }
      floats(Shared::kBeta)[threadIdx.x] = beta;
    }
    copy_wait<0>();
    __syncthreads();
    row_beta[0] = floats(Shared::kBeta)[row(0)];
    row_beta[1] = floats(Shared::kBeta)[row(1)];
  }

  // 1 / norm of rows g and g + 8 of q or k.
  __device__ __forceinline__ void inverse_norms(int matrix, float (&result)[2]) const {
    result[0] = result[1] = 1.0f;
    if (!args.l2norm) return;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t r[4];
      ldmatrix(r, block_address(matrix, warp, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<Element>(r[i]);
        sum[i & 1] = fmaf(x.x, x.x, fmaf(x.y, x.y, sum[i & 1]));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      result[h] = rsqrtf(sum[h] + 1e-6f);
    }
  }

  // log2 decays of tokens 2t, 2t + 1 (+ 8 half) and channel g (+ 8 n) of the step.
  __device__ __forceinline__ void gates(int step, float rate, float (&x)[2][2][2]) const {
    if constexpr (sizeof(GateElement) == 2) {
      uint32_t r[4];
      ldmatrix_trans(r, block_address(Image::kMinusW, warp, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<GateElement>(r[i]);
        x[i >> 1][i & 1][0] = pair.x;
        x[i >> 1][i & 1][1] = pair.y;
      }
    } else {
      const float* rows =
          static_cast<const float*>(args.gate) + first * args.gate_stride + head * K + 16 * step + g;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int token = 16 * warp + 2 * t + (i & 1) + 8 * ((i >> 1) & 1);
        x[i >> 2][(i >> 1) & 1][i & 1] =
            token < length ? rows[token * args.gate_stride + 8 * (i >> 2)] : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float bias =
          args.dt_bias != nullptr ? __ldg(args.dt_bias + head * K + 16 * step + 8 * n + g) : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float y = log2_decay(args.gate_kind, x[n][h][e], bias, rate, args.lower_bound);
          x[n][h][e] = 16 * warp + 8 * h + 2 * t + e < length ? y : 0.0f;
        }
      }
    }
  }

  // sum[n] (accumulator layout, 16 tokens x 8 channels) = inclusive sum over tokens of x: a product with a
  // triangle of ones, each float as two tf32 terms. Token 2t stands at k = t, token 2t + 1 at k = t + 4.
  __device__ __forceinline__ void cumulative(const float (&x)[2][2][2], float (&sum)[2][4]) const {
    const float even = 2 * t <= g ? 1.0f : 0.0f;
    const float odd = 2 * t + 1 <= g ? 1.0f : 0.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float high[2][2], low[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = x[n][i >> 1][i & 1];
        high[i >> 1][i & 1] = __uint_as_float(__float_as_uint(value) & 0xFFFFE000u);
        low[i >> 1][i & 1] = value - high[i >> 1][i & 1];
      }
      sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
      mma_tf32(sum[n], even, 1.0f, odd, 1.0f, low[0][0], low[0][1]);
      mma_tf32(sum[n], 0.0f, even, 0.0f, odd, low[1][0], low[1][1]);
      mma_tf32(sum[n], even, 1.0f, odd, 1.0f, high[0][0], high[0][1]);
      mma_tf32(sum[n], 0.0f, even, 0.0f, odd, high[1][0], high[1][1]);
    }
  }

  // Diagonal blocks of this warp in registers; leaves k 2^(G - start) and q 2^(G - start) as fp16 in the
  // places of k and q, k 2^(end - G) among the columns, and the sub-chunk's decay in the table.
  __device__ __forceinline__ void diagonal() {
    float k_norm[2], q_norm[2];
    inverse_norms(Image::kK, k_norm);
    inverse_norms(Image::kQ, q_norm);
    const float rate =
        args.a_log != nullptr && args.gate_kind != KdaGate::kNone ? __expf(args.a_log[head]) : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) l[3][i >> 2][i & 3] = p[3][i >> 2][i & 3] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      float x[2][2][2], sum[2][4];
      gates(step, rate, x);
      cumulative(x, sum);
      if (g == 7) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          *reinterpret_cast<float2*>(floats(Shared::kTotal) + warp * K + 16 * step + 8 * n + 2 * t) = {
              sum[n][2], sum[n][3]};
      }
      uint32_t kr[4], qr[4], columns[4];
      ldmatrix(kr, block_address(Image::kK, warp, step));
      ldmatrix(qr, block_address(Image::kQ, warp, step));
      float k[4][2], q[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 kx = unpack<Element>(kr[i]), qx = unpack<Element>(qr[i]);
        k[i][0] = kx.x * k_norm[i & 1];
        k[i][1] = kx.y * k_norm[i & 1];
        q[i][0] = qx.x * q_norm[i & 1];
        q[i][1] = qx.y * q_norm[i & 1];
      }
      const float least = fminf(fminf(sum[0][2], sum[0][3]), fminf(sum[1][2], sum[1][3]));
      __syncwarp();  // k and q of this step have been read by all lanes
      if (__any_sync(~0u, least < -104.0f)) {
        steep_step(sum, k, q, kr, qr, columns);
      } else {
        gentle_step(sum, k, q, kr, qr, columns);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(pair_address(Image::kK, i & 1, step, i >> 1), kr[i]);
        store_shared(pair_address(Image::kQ, i & 1, step, i >> 1), qr[i]);
      }
      *reinterpret_cast<uint4*>(shared + Shared::kColumns + ((warp * kSteps + step) * 32 + lane) * 16) =
          make_uint4(columns[0], columns[1], columns[2], columns[3]);
    }
  }

  __device__ __forceinline__ void gentle_step(const float (&sum)[2][4], const float (&k)[4][2],
                                              const float (&q)[4][2], uint32_t (&kr)[4], uint32_t (&qr)[4],
                                              uint32_t (&columns)[4]) {
    uint32_t row_k[4], row_q[4], column[4];
    float up[4][2], inverse[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = sum[i >> 1][2 * (i & 1) + e];
        up[i][e] = fast_exp2(s);
        inverse[i][e] = k[i][e] * fast_exp2(-s);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float k0 = k[i][0] * up[i][0], k1 = k[i][1] * up[i][1];
      const float q0 = q[i][0] * up[i][0], q1 = q[i][1] * up[i][1];
      row_k[i] = pack<__nv_bfloat16>(k0, k1);
      row_q[i] = pack<__nv_bfloat16>(q0, q1);
      kr[i] = pack<__half>(k0, k1);
      qr[i] = pack<__half>(q0, q1);
      column[i] = pack<__nv_bfloat16>(inverse[i][0], inverse[i][1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float end0 = __shfl_sync(~0u, up[2 * n + 1][0], 28 + t);
      const float end1 = __shfl_sync(~0u, up[2 * n + 1][1], 28 + t);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        columns[2 * n + h] = pack<__half>(inverse[2 * n + h][0] * end0, inverse[2 * n + h][1] * end1);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma<__nv_bfloat16>(l[3][n], row_k, column[n], column[2 + n]);
      mma<__nv_bfloat16>(p[3][n], row_q, column[n], column[2 + n]);
    }
  }

  __device__ __forceinline__ void steep_step(const float (&sum)[2][4], const float (&k)[4][2],
                                             const float (&q)[4][2], uint32_t (&kr)[4], uint32_t (&qr)[4],
                                             uint32_t (&columns)[4]) {
    uint32_t first_k[4], first_q[4];    // rows for the columns 0 to 7, relative to token 4
    uint32_t second_k[4], second_q[4];  // for the columns 8 to 15, relative to token 12
    uint32_t column[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float anchor[2][2], end[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        anchor[0][e] = __shfl_sync(~0u, sum[n][e], 16 + t);
        anchor[1][e] = __shfl_sync(~0u, sum[n][2 + e], 16 + t);
        end[e] = __shfl_sync(~0u, sum[n][2 + e], 28 + t);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * n + h;
        float own[2], first[2], inverse[2], up[2], down[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float s = sum[n][2 * h + e];
          own[e] = fast_exp2(s - anchor[h][e]);
          inverse[e] = fast_exp2(anchor[h][e] - s);
          first[e] = h == 0 ? own[e] : fast_exp2(s - anchor[0][e]);
          up[e] = fast_exp2(s);
          down[e] = fast_exp2(end[e] - s);
        }
        first_k[i] = pack<__nv_bfloat16>(k[i][0] * first[0], k[i][1] * first[1]);
        first_q[i] = pack<__nv_bfloat16>(q[i][0] * first[0], q[i][1] * first[1]);
        second_k[i] = h == 0 ? 0 : pack<__nv_bfloat16>(k[i][0] * own[0], k[i][1] * own[1]);
        second_q[i] = h == 0 ? 0 : pack<__nv_bfloat16>(q[i][0] * own[0], q[i][1] * own[1]);
        column[i] = pack<__nv_bfloat16>(k[i][0] * inverse[0], k[i][1] * inverse[1]);
        kr[i] = pack<__half>(k[i][0] * up[0], k[i][1] * up[1]);
        qr[i] = pack<__half>(q[i][0] * up[0], q[i][1] * up[1]);
        columns[i] = pack<__half>(k[i][0] * down[0], k[i][1] * down[1]);
      }
    }
    mma<__nv_bfloat16>(l[3][0], first_k, column[0], column[2]);
    mma<__nv_bfloat16>(p[3][0], first_q, column[0], column[2]);
    mma<__nv_bfloat16>(l[3][1], second_k, column[1], column[3]);
    mma<__nv_bfloat16>(p[3][1], second_q, column[1], column[3]);
  }

  // One thread per channel: decays before, after and between sub-chunks, and of the chunk.
  __device__ __forceinline__ void factors() {
    const int channel = threadIdx.x;
    if (channel < K) {
      float total[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] = floats(Shared::kTotal)[i * K + channel];
      float before = 0.0f, after = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        floats(Shared::kBefore)[i * K + channel] = fast_exp2(before);
        floats(Shared::kAfter)[(3 - i) * K + channel] = fast_exp2(after);
        before += total[i];
        after += total[3 - i];
      }
      floats(Image::kDecay)[channel] = fast_exp2(before);
      __half* between = reinterpret_cast<__half*>(shared + Shared::kBetween);
      between[channel] = __float2half_rn(fast_exp2(total[1]));
      between[K + channel] = __float2half_rn(fast_exp2(total[2]));
      between[2 * K + channel] = __float2half_rn(fast_exp2(total[1] + total[2]));
    }
    __syncthreads();
  }

  // Blocks left of the diagonal, and the matrices q, k and k 2^G (in the place of the gate) of this warp's
  // rows.
  __device__ __forceinline__ void off_diagonal() {
#pragma unroll
    for (int i = 0; i < 24; ++i) l[i >> 3][(i >> 2) & 1][i & 3] = p[i >> 3][(i >> 2) & 1][i & 3] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      uint32_t kr[4], qr[4];
      ldmatrix(kr, block_address(Image::kK, warp, step));
      ldmatrix(qr, block_address(Image::kQ, warp, step));
      const auto columns = [&](int sub_chunk) {
        return *reinterpret_cast<const uint4*>(shared + Shared::kColumns +
                                               ((sub_chunk * kSteps + step) * 32 + lane) * 16);
      };
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (j >= warp) continue;
        uint32_t rows_k[4], rows_q[4];
        if (j == warp - 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i) rows_k[i] = kr[i], rows_q[i] = qr[i];
        } else {  // (2, 0): sub-chunk 1; (3, 1): 2; (3, 0): 1 and 2
          const int which = warp == 2 ? 0 : (j == 1 ? 1 : 2);
          const uint8_t* table = shared + Shared::kBetween + (which * K + 16 * step + 2 * t) * 2;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const __half2 factor = *reinterpret_cast<const __half2*>(table + 16 * (i >> 1));
            const __half2 a = __hmul2(*reinterpret_cast<__half2*>(&kr[i]), factor);
            const __half2 b = __hmul2(*reinterpret_cast<__half2*>(&qr[i]), factor);
            rows_k[i] = *reinterpret_cast<const uint32_t*>(&a);
            rows_q[i] = *reinterpret_cast<const uint32_t*>(&b);
          }
        }
        const uint4 c = columns(j);
        mma<__half>(l[j][0], rows_k, c.x, c.z);
        mma<__half>(l[j][1], rows_k, c.y, c.w);
        mma<__half>(p[j][0], rows_q, c.x, c.z);
        mma<__half>(p[j][1], rows_q, c.y, c.w);
      }
      const uint4 own = columns(warp);
      const uint32_t column[4] = {own.x, own.y, own.z, own.w};
      __syncwarp();  // rows of this step have been read
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int channel = warp * K + 16 * step + 8 * n + 2 * t;
        const float2 before = *reinterpret_cast<const float2*>(floats(Shared::kBefore) + channel);
        const float2 after = *reinterpret_cast<const float2*>(floats(Shared::kAfter) + channel);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 2 * n + h;
          const float2 k = unpack<__half>(kr[i]), q = unpack<__half>(qr[i]), c = unpack<__half>(column[i]);
          store_shared(pair_address(Image::kMinusW, h, step, n),
                       pack<Element>(k.x * before.x, k.y * before.y));
          store_shared(pair_address(Image::kQ, h, step, n),
                       pack<Element>(q.x * before.x * args.scale, q.y * before.y * args.scale));
          store_shared(pair_address(Image::kK, h, step, n), pack<Element>(c.x * after.x, c.y * after.y));
        }
      }
    }
    __syncthreads();  // the columns make room for P and A, the tables for the blocks of A
  }

  __device__ __forceinline__ float* block(int i, int j) const {
    return floats(Shared::kBlocks) + (i * (i + 1) / 2 + j) * 16 * Shared::kBlockLd;
  }

  // Block (warp, j) of P or A: [n] holds columns 16 j + 8 n + 2t, +1.
  __device__ __forceinline__ void store_block(int matrix, int j, const float (&x)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(pair_address(matrix, h, j, n), pack<Element>(x[n][2 * h], x[n][2 * h + 1]));
    }
  }

  // P to its place, zeros above the diagonal of P and A; L: beta and the strict triangle.
  __device__ __forceinline__ void finish_products();

  // A of the diagonal block by forward substitution, a column per lane (the upper half of the lanes does it
  // again).
  __device__ __forceinline__ void invert_diagonal();

  // d += X B, X in accumulator layout (16 x 16), B a block in shared memory: tf32, column 2t at k = t, 2t + 1
  // at t + 4.
  __device__ __forceinline__ void multiply_block(float (&d)[2][4], const float (&x)[2][4],
                                                 const float* b) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* rows = b + (8 * k + 2 * t) * Shared::kBlockLd + g;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_tf32(d[n], round_tf32(x[k][0]), round_tf32(x[k][2]), round_tf32(x[k][1]), round_tf32(x[k][3]),
                 round_tf32(rows[8 * n]), round_tf32(rows[8 * n + Shared::kBlockLd]));
      }
    }
  }

  // Blocks of A left of the diagonal, one diagonal after the other: A_IJ = -A_II sum_M L_IM A_MJ.
  __device__ __forceinline__ void invert_rest();

  // -A diag(beta) (k 2^G), in the place of k 2^G.
  __device__ __forceinline__ void product_w();
};

}  // namespace kilin::cuda::backward
