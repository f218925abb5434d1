// SPDX-License-Identifier: Apache-2.0
// First stage of the gradients (kda_backward_prepare_sm90.cuh): loads, norms, decays, L and P. What one warp
// does of its 16 tokens is that of the chunk kernels (kda_pairs_sm90.cuh), but for operands in fp16.
#pragma once
#include "kernels/kda/kda_backward_sm90.cuh"
#include "kernels/kda/kda_gates_sm90.cuh"
#include "kernels/kda/kda_inverse_sm90.cuh"
#include "kernels/kda/kda_pairs_sm90.cuh"

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

__device__ __forceinline__ float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// State of one thread of kda_prepare; the steps in the order in which they are called.
template <class Element, int K, class GateElement>
struct Prepare {
  using Image = KdaImage<K>;
  using Shared = PrepareShared<K>;
  using Pairs = ChunkPairs<Element, __half>;
  static constexpr int kSteps = K / 16;  // of 16 channels

  const KdaPrepareArgs& args;
  uint8_t* shared;
  uint32_t base;     // the same as an address
  int head, length;  // value head, tokens of this chunk
  int64_t first;     // token
  int warp, lane, g, t;
  float row_beta[2];  // of rows g and g + 8
  float l[4][2][4];   // L of this warp's rows, [sub-chunk][8 columns][registers]; [3] is the diagonal block
  float p[4][2][4];   // q k^T alike

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  __device__ __forceinline__ int row(int half) const { return 16 * warp + g + 8 * half; }
  // Address for ldmatrix and stmatrix of the 16 x 16 block (rows of sub-chunk, columns 16 step ...) of a
  // swizzled matrix.
  __device__ __forceinline__ uint32_t block_address(int matrix, int sub_chunk, int step) const {
    const int r = 16 * sub_chunk + (lane & 15);
    return base + matrix + swizzled<kChunk>(r, 2 * step + (lane >> 4));
  }

  __device__ __forceinline__ void load() {
    const int kv_head = head / (args.value_heads / args.heads);
    const auto copy = [&](int matrix, const void* from, int64_t stride, int column) {
      copy_rows<128, K / 8>(static_cast<const Element*>(from) + first * stride + column, stride, length,
                            [&](int r, int piece) { return base + matrix + swizzled<kChunk>(r, piece); });
    };
    if constexpr (sizeof(GateElement) == 2) copy(Image::kMinusW, args.gate, args.gate_stride, head * K);
    copy(Image::kK, args.k, args.k_stride, kv_head * K);
    copy(Image::kQ, args.q, args.q_stride, kv_head * K);
    copy_commit();
    if (threadIdx.x < kChunk) {
      float beta = 0.0f;
      if (threadIdx.x < length) {
        beta = beta_of(cuda::load(args.beta, args.beta_type, (first + threadIdx.x) * args.beta_stride + head),
                       args.beta_is_logit, args.beta_scale);
      }
      floats(Shared::kBeta)[threadIdx.x] = beta;
    }
    copy_wait<0>();
    __syncthreads();
    row_beta[0] = floats(Shared::kBeta)[row(0)];
    row_beta[1] = floats(Shared::kBeta)[row(1)];
  }

  // 1 / norm of rows g and g + 8 of q or k.
  __device__ __forceinline__ void inverse_norms(int matrix, float (&norm)[2]) const {
    norm[0] = norm[1] = 1.0f;
    if (!args.l2norm) return;
    float upper[4] = {}, lower[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t r[4];
      ldmatrix(r, block_address(matrix, warp, step));
      Pairs::add_squares(upper, lower, r);
    }
    Pairs::inverse_norms(lane, upper, lower, norm);
  }

  // log2 decays of a step, as raw_gates() lays them out.
  template <KdaGate kGate>
  __device__ __forceinline__ void gates(int step, const GateCurve& curve, float (&x)[2][2][2]) const {
    const int channel = head * K + 16 * step + g;
    const float* rows = nullptr;
    if constexpr (sizeof(GateElement) == 4)
      rows = static_cast<const float*>(args.gate) + (first + 16 * warp) * args.gate_stride + channel;
    raw_gates<GateElement>(block_address(Image::kMinusW, warp, step), rows, args.gate_stride, t,
                           length - 16 * warp, x);
    const float* biases = args.dt_bias != nullptr ? args.dt_bias + channel : nullptr;
    log2_decays<kGate>([&](int n) { return biases != nullptr ? __ldg(biases + 8 * n) : 0.0f; }, curve, t,
                       length - 16 * warp, x);
  }
  // The kind of gate is an argument of the kernel here, not of the template: a third as many kernels, for one
  // branch per step.
  __device__ __forceinline__ void gates(int step, const GateCurve& curve, float (&x)[2][2][2]) const {
    if (args.gate_kind == KdaGate::kSoftplus) {
      gates<KdaGate::kSoftplus>(step, curve, x);
    } else if (args.gate_kind == KdaGate::kBounded) {
      gates<KdaGate::kBounded>(step, curve, x);
    } else {
      gates<KdaGate::kNone>(step, curve, x);
    }
  }

  // Diagonal blocks of this warp in registers; leaves k 2^(G - start) and q 2^(G - start) as fp16 in the
  // places of k and q, k 2^(end - G) among the columns, and the sub-chunk's decay in the table.
  __device__ __forceinline__ void diagonal() {
    typename Pairs::Factors factors;
    inverse_norms(Image::kK, factors.k);
    inverse_norms(Image::kQ, factors.q);
    const GateCurve curve = gate_curve(args.gate_kind, gate_speed(args, head), args.lower_bound);
    uint32_t ones[4];
    Pairs::triangle(g, t, ones);
#pragma unroll
    for (int i = 0; i < 8; ++i) l[3][i >> 2][i & 3] = p[3][i >> 2][i & 3] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      float x[2][2][2], sum[2][4];
      gates(step, curve, x);
      Pairs::cumulative(ones, x, sum);
      if (g == 7) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          *reinterpret_cast<float2*>(floats(Shared::kTotal) + warp * K + 16 * step + 8 * n + 2 * t) = {
              sum[n][2], sum[n][3]};
      }
      uint32_t kr[4], qr[4];
      ldmatrix(kr, block_address(Image::kK, warp, step));
      ldmatrix(qr, block_address(Image::kQ, warp, step));
      const float least = fminf(fminf(sum[0][2], sum[0][3]), fminf(sum[1][2], sum[1][3]));
      __syncwarp();  // k and q of this step have been read by all lanes
      typename Pairs::Operands o;
      float decay[4];  // not used: the decays of sub-chunks are made from their logarithms
      if (__any_sync(~0u, least < -104.0f)) {
        Pairs::steep(t, sum, kr, qr, factors, decay, o, l[3], p[3]);
      } else {
        Pairs::template gentle<false>(t, sum, kr, qr, factors, decay, o, l[3], p[3]);
      }
      stmatrix(block_address(Image::kK, warp, step), o.k);
      stmatrix(block_address(Image::kQ, warp, step), o.q);
      *reinterpret_cast<uint4*>(shared + Shared::kColumns + ((warp * kSteps + step) * 32 + lane) * 16) =
          make_uint4(o.keys[0], o.keys[1], o.keys[2], o.keys[3]);
    }
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
      uint32_t early_k[4], early_q[4], late_k[4];  // k 2^G, scale q 2^G, k 2^(G_C - G)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = warp * K + 16 * step + 8 * (i >> 1) + 2 * t;
        const float2 before = *reinterpret_cast<const float2*>(floats(Shared::kBefore) + channel);
        const float2 after = *reinterpret_cast<const float2*>(floats(Shared::kAfter) + channel);
        const float2 k = unpack<__half>(kr[i]), q = unpack<__half>(qr[i]), c = unpack<__half>(column[i]);
        early_k[i] = pack<Element>(k.x * before.x, k.y * before.y);
        early_q[i] = pack<Element>(q.x * before.x * args.scale, q.y * before.y * args.scale);
        late_k[i] = pack<Element>(c.x * after.x, c.y * after.y);
      }
      __syncwarp();  // rows of this step have been read
      stmatrix(block_address(Image::kMinusW, warp, step), early_k);
      stmatrix(block_address(Image::kQ, warp, step), early_q);
      stmatrix(block_address(Image::kK, warp, step), late_k);
    }
    __syncthreads();  // the columns make room for P and A, the tables for the blocks of A
  }

  __device__ __forceinline__ float* block(int i, int j) const {
    return floats(Shared::kBlocks) + (i * (i + 1) / 2 + j) * 16 * Shared::kBlockLd;
  }

  // Block (warp, j) of P or A, from accumulators.
  __device__ __forceinline__ void store_block(int matrix, int j, const float (&x)[2][4]) const {
    uint32_t packed[4];
    pack_operand<Element>(&x[0][0], packed);
    stmatrix(block_address(matrix, warp, j), packed);
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
