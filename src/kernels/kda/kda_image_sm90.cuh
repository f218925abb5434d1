// SPDX-License-Identifier: Apache-2.0
// One warp makes the image of one chunk and value head (kda_sm90.cuh), in place, without any barrier of the
// block.
//
// Every element is handled in the registers of the thread that holds it as an operand of a matrix product:
// the cumulative gate is a product with a triangle of ones, whose result lies where ldmatrix puts q and k; an
// A operand of a matrix is a B operand of its transpose, so L, P and the norms never leave the registers
// before they are done.
//
// Keys are not normalised but multiplied by the power of two below 1 / norm, which rounds nothing; the rest
// of the norm goes into the factors of the tokens with beta. So A has ones on its diagonal, and where decays
// are strong, neither A nor the newest keys are rounded (docs/notes/20261126-cuda-strong-decays.md).
#pragma once
#include "kernels/cuda/scalar.cuh"
#include "kernels/kda/kda_gates_sm90.cuh"
#include "kernels/kda/kda_inverse_sm90.cuh"
#include "kernels/kda/kda_pairs_sm90.cuh"
#include "kernels/kda/kda_sm90.cuh"

namespace kilin::cuda {

// Asks the L2 for the rows of the chunk at `token` of a value head, so that their copies will be quick: q, k,
// gate and, with values > 0, so many columns of v from v_column on.
template <class Element, int K, class GateElement>
__device__ __forceinline__ void prefetch_rows(const KdaArgs& args, int head, int kv_head, int token, int end,
                                              int v_column, int values) {
  constexpr int kLines = K / 64;  // of 128 bytes per row
  const int lane = threadIdx.x & 31;
  const int row = token + (lane & 15);
  if (row >= end) return;
  const auto ask = [](const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); };
  for (int i = lane >> 4; i < kLines; i += 2) {
    ask(row_address(static_cast<const Element*>(args.k), row, args.k_stride, kv_head * K + i * 64));
    ask(row_address(static_cast<const Element*>(args.q), row, args.q_stride, kv_head * K + i * 64));
    if constexpr (sizeof(GateElement) == 2)
      ask(row_address(static_cast<const GateElement*>(args.gate), row, args.gate_stride, head * K + i * 64));
  }
  for (int i = lane >> 4; i < values / 64; i += 2)
    ask(row_address(static_cast<const Element*>(args.v), row, args.v_stride, v_column + i * 64));
}

// kTogether: steps of 16 channels side by side, for the latencies.
template <class Element, int K, class GateElement, KdaGate kGate, int kTogether>
struct ImageWarp {
  using Image = KdaImage<K>;
  using Pairs = ChunkPairs<Element>;
  using Operands = typename Pairs::Operands;
  using Factors = typename Pairs::Factors;
  using Decay = typename Pairs::Decay;
  static constexpr int kSteps = K / 16;  // of 16 channels

  const KdaArgs& args;
  int head;         // value head
  int kv_head;      // of q and k
  uint32_t place;   // of the image, an address in shared memory
  uint8_t* shared;  // the same as a pointer
  int first;        // token
  int length;       // 1 to 16
  int lane, g, t;
  float log_speed;  // a_log
  GateCurve curve;
  uint32_t raw_beta;  // of token lane % 16

  __device__ __forceinline__ ImageWarp(const KdaArgs& arguments, int value_head)
      : args(arguments),
        head(value_head),
        kv_head(__shfl_sync(~0u, value_head / (arguments.value_heads / arguments.heads), 0)),  // uniform
        lane(threadIdx.x & 31),
        g(lane >> 2),
        t(lane & 3) {
    log_speed = args.a_log != nullptr && kGate != KdaGate::kNone ? args.a_log[head] : 0.0f;
  }

  // Raw q, k and gate; 32 / (K / 8) rows at once.
  template <bool kAll>
  __device__ __forceinline__ void copy_rows() const {
    constexpr int kPieces = K / 8, kAtOnce = 32 / kPieces;
    const int piece = lane % kPieces, row = lane / kPieces;
    const int token = first + row;
    const Element* k =
        row_address(static_cast<const Element*>(args.k), token, args.k_stride, kv_head * K + piece * 8);
    const Element* q =
        row_address(static_cast<const Element*>(args.q), token, args.q_stride, kv_head * K + piece * 8);
    const GateElement* gate = row_address(static_cast<const GateElement*>(args.gate), token, args.gate_stride,
                                          head * K + piece * 8);
    // Row i kAtOnce + row has the row of its swizzle from two disjoint sets of bits.
    const uint32_t keys = place + Image::kKeys + swizzled<16>(row, piece);
    const uint32_t rows = place + Image::kRows + swizzled<32>(row, piece);
#pragma unroll
    for (int i = 0; i < kChunk / kAtOnce; ++i) {
      const bool valid = kAll || i * kAtOnce + row < length;
      const uint32_t other = ((i * kAtOnce) & 7) << 4, down = i * kAtOnce * 128;
      const int step = valid ? i * kAtOnce : 0;
      if constexpr (sizeof(GateElement) == 2)
        copy_16_async((rows ^ other) + down, row_address(gate, step, args.gate_stride), valid);
      copy_16_async((rows ^ other) + down + 16 * 128, row_address(q, step, args.q_stride), valid);
      copy_16_async((keys ^ other) + down, row_address(k, step, args.k_stride), valid);
    }
  }

  // Begins the copies of raw q, k, gate and bias (cp.async, not committed), and loads beta.
  __device__ __forceinline__ void load(uint8_t* to, int token, int tokens) {
    shared = to;
    place = shared_address(to);
    first = token;
    length = tokens;
    if (length == kChunk) {
      copy_rows<true>();
    } else {
      copy_rows<false>();
    }
    if (lane < K / 4) {
      int channel = head * K + lane * 4;
      asm volatile("" : "+r"(channel));  // or the pointer would be kept, and spilled, from image to image
      const float* bias = args.dt_bias != nullptr ? args.dt_bias + channel : nullptr;
      copy_16_async(place + Image::kDecay + lane * 16, bias, bias != nullptr);
    }
    const int r = lane & 15;
    raw_beta = 0;
    if (r < length)
      raw_beta =
          load_bits(args.beta, args.beta_type, static_cast<int64_t>(first + r) * args.beta_stride + head);
  }

  // Address for ldmatrix and stmatrix of the block of 16 rows and 16 columns of step `number` of the rows;
  // those of q lie 16 * 128 bytes behind, those of the keys to_keys(number) bytes.
  __device__ __forceinline__ uint32_t block(int number) const {
    return ((place + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4)) ^ ((number & 3) << 5)) +
           (number >> 2) * (2 * kChunk * 128);
  }
  static constexpr uint32_t kToQ = kChunk * 128;
  __device__ __forceinline__ static uint32_t to_keys(int number) {
    return Image::kKeys - (number >> 2) * (kChunk * 128);
  }
  // Of a 16 x 16 matrix in cores.
  __device__ __forceinline__ uint32_t square(int matrix) const {
    return place + matrix + ((lane >> 3) & 1) * 256 + (lane >> 4) * 128 + (lane & 7) * 16;
  }

  // log2 decays of a step, as raw_gates() lays them out.
  __device__ __forceinline__ void gates(int step, uint32_t at, float (&x)[2][2][2]) const {
    const float* rows = nullptr;
    if constexpr (sizeof(GateElement) == 4)
      rows = static_cast<const float*>(args.gate) + static_cast<int64_t>(first) * args.gate_stride +
             head * K + 16 * step + g;
    raw_gates<GateElement>(at, rows, args.gate_stride, t, length, x);
    const float* biases = reinterpret_cast<const float*>(shared + Image::kDecay) + 16 * step + g;
    log2_decays<kGate>([&](int n) { return biases[8 * n]; }, curve, t, length, x);
  }

  template <Decay kDecay>
  __device__ __forceinline__ void step(int number, uint32_t at, const float (&sum)[2][4],
                                       const uint32_t (&kr)[4], const uint32_t (&qr)[4],
                                       const Factors& factors, float (&l)[2][4], float (&p)[2][4]) const {
    Operands o;
    float decay[4];
    Pairs::template add<kDecay>(t, sum, kr, qr, factors, decay, o, l, p);
    stmatrix(at, o.k);
    stmatrix(at + kToQ, o.q);
    stmatrix(at + to_keys(number), o.keys);
    if (g == 7) {
      reinterpret_cast<float4*>(shared + Image::kDecay)[4 * number + t] = {decay[0], decay[1], decay[2],
                                                                           decay[3]};
    }
  }

  // A = (I + L)^-1 by forward substitution, a column per lane (the upper lanes do it again), in the places of
  // P and A; leaves A as an A operand, and minus A with its rows times `rows`, its columns times `columns` in
  // two terms: in one, its rounding would be the largest error where the same keys come again and again.
  __device__ __forceinline__ void invert(const float (&l)[2][4], const float (&rows)[2],
                                         const float2 (&columns)[2], uint32_t (&a)[4], uint32_t (&high)[4],
                                         uint32_t (&low)[4]) const {
    float* scratch = reinterpret_cast<float*>(shared + Image::kP);  // [16][16]
    store_square<16>(scratch, g, t, l);
    __syncwarp();
    const int column = lane & 15;
    float x[16];
    inverse_column<16>(scratch, column, x);
    __syncwarp();
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) scratch[i * 16 + column] = x[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(scratch + (g + 8 * (i & 1)) * 16 + 8 * (i >> 1) + 2 * t);
      a[i] = pack<Element>(pair.x, pair.y);
      const float first = -rows[i & 1] * columns[i >> 1].x * pair.x;
      const float second = -rows[i & 1] * columns[i >> 1].y * pair.y;
      high[i] = pack<Element>(first, second);
      const float2 rounded = unpack<Element>(high[i]);
      low[i] = pack<Element>(first - rounded.x, second - rounded.y);
    }
    __syncwarp();
  }

  // What load began has arrived. Leaves the image, not yet visible to the asynchronous proxy.
  __device__ __forceinline__ void make() {
    curve = gate_curve(kGate, __expf(log_speed), args.lower_bound);
    const float beta = beta_of(float_of_bits(raw_beta, args.beta_type),
                               args.beta_is_logit && (lane & 15) < length, args.beta_scale);
    float k_norm[2] = {1.0f, 1.0f};
    Factors factors{{}, {1.0f, 1.0f}};
    if (args.l2norm) {
      float squares[4][4] = {};
#pragma unroll 4
      for (int number = 0; number < kSteps; ++number) {
        uint32_t kr[4], qr[4];
        ldmatrix(kr, block(number) + to_keys(number));
        ldmatrix(qr, block(number) + kToQ);
        Pairs::add_squares(squares[0], squares[1], kr);
        Pairs::add_squares(squares[2], squares[3], qr);
      }
      Pairs::inverse_norms(lane, squares[0], squares[1], k_norm);
      Pairs::inverse_norms(lane, squares[2], squares[3], factors.q);
    }
    float* token_factors = reinterpret_cast<float*>(shared + Image::kFactor);
    float* rests = reinterpret_cast<float*>(shared + Image::kBytes);  // of the norms of k
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factors.q[h] *= args.scale;
      const uint32_t norm = __float_as_uint(k_norm[h]);
      factors.k[h] = __uint_as_float(norm & 0x7F800000u);
      const float rest = __uint_as_float((norm & 0x007FFFFFu) | 0x3F800000u);
      const float row_beta = __shfl_sync(~0u, beta, g + 8 * h);
      if (t == 0) {
        token_factors[g + 8 * h] = rest * row_beta;
        rests[g + 8 * h] = rest;
      }
    }
    uint32_t ones[4];
    Pairs::triangle(g, t, ones);
    float l[2][4] = {}, p[2][4] = {};
#pragma unroll 1
    for (int step0 = 0; step0 < kSteps; step0 += kTogether) {
      static_assert(kTogether <= 2);
      const uint32_t at = block(step0);  // of step0 + i: at ^ 32 i
      float x[kTogether][2][2][2], sum[kTogether][2][4];
      uint32_t kr[kTogether][4], qr[kTogether][4];
      float least = 0.0f;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) gates(step0 + i, at ^ (32 * i), x[i]);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        ldmatrix(kr[i], (at ^ (32 * i)) + to_keys(step0));
        ldmatrix(qr[i], (at ^ (32 * i)) + kToQ);
        Pairs::cumulative(ones, x[i], sum[i]);
        least = fminf(least, fminf(fminf(sum[i][0][2], sum[i][0][3]), fminf(sum[i][1][2], sum[i][1][3])));
      }
      const bool strong = __any_sync(~0u, least < -104.0f), strongest = __any_sync(~0u, least < -216.0f);
      __syncwarp();  // all lanes have read gate, bias, k and q of these steps
      if (!strong) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          step<Decay::kGentle>(step0 + i, at ^ (32 * i), sum[i], kr[i], qr[i], factors, l, p);
      } else if (!strongest) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          step<Decay::kShifted>(step0 + i, at ^ (32 * i), sum[i], kr[i], qr[i], factors, l, p);
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          step<Decay::kSteep>(step0 + i, at ^ (32 * i), sum[i], kr[i], qr[i], factors, l, p);
      }
    }
    // The triangles; what is left of the norms, and beta of the columns on L.
    float2 columns[2];
    float row_factors[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) columns[n] = *reinterpret_cast<const float2*>(token_factors + 8 * n + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float rest = rests[g + 8 * h];
      row_factors[h] = token_factors[g + 8 * h];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = g + 8 * h, column = 8 * n + 2 * t + e;
          const float factor = rest * (e == 0 ? columns[n].x : columns[n].y);
          p[n][2 * h + e] = row >= column ? p[n][2 * h + e] : 0.0f;
          l[n][2 * h + e] = row > column ? l[n][2 * h + e] * factor : 0.0f;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) columns[n] = *reinterpret_cast<const float2*>(rests + 8 * n + 2 * t);
    uint32_t a[4], high[4], low[4];
    invert(l, row_factors, columns, a, high, low);
    uint32_t packed_p[4];
    pack_operand<Element>(&p[0][0], packed_p);
    stmatrix(square(Image::kP), packed_p);
    stmatrix(square(Image::kA), a);
    // Minus w in the place of k^ 2^G, four steps at once for the latencies.
#pragma unroll
    for (int step0 = 0; step0 < kSteps; step0 += 4) {
      uint32_t b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix_trans(b[i], block(step0 + i));
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float w[2][4] = {};
        mma<Element>(w[0], low, b[i][0], b[i][1]);
        mma<Element>(w[1], low, b[i][2], b[i][3]);
        mma<Element>(w[0], high, b[i][0], b[i][1]);
        mma<Element>(w[1], high, b[i][2], b[i][3]);
        uint32_t packed[4];
        pack_operand<Element>(&w[0][0], packed);
        stmatrix(block(step0 + i), packed);
      }
    }
  }
};

// Images to the workspace: a warp per chunk and value head, neighbouring heads side by side.
constexpr int kImageWarps = 5;

template <class Element, int K, class GateElement, KdaGate kGate>
__global__ void __launch_bounds__(kImageWarps * 32, 3)
    kda_images(const __grid_constant__ KdaArgs args, int64_t count) {
  using Image = KdaImage<K>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const int64_t number = blockIdx.x * int64_t{kImageWarps} + warp;
  if (number >= count) return;
  const int64_t chunk = number / args.value_heads;
  int64_t first;
  int length;
  if (!locate_chunk<kChunk>(args.layout, chunk, first, length)) return;
  ImageWarp<Element, K, GateElement, kGate, 1> image(args, static_cast<int>(number % args.value_heads));
  image.load(shared + warp * Image::kPlace, static_cast<int>(first), length);
  copy_commit();
  copy_wait<0>();
  __syncwarp();
  image.make();
  async_proxy_fence();
  __syncwarp();
  if (image.lane == 0) {
    bulk_store(args.images + number * Image::kBytes, image.place, Image::kBytes);
    bulk_commit();
    bulk_wait_read();
  }
}

}  // namespace kilin::cuda
