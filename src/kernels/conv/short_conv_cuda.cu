// SPDX-License-Identifier: Apache-2.0
// Final states are written by a kernel of their own behind the main one: when they replace the initial states
// in place, no block of the main kernel can find them changed.
#include "kernels/conv/short_conv_cuda.cuh"

namespace kilin {
namespace {

using namespace short_conv;

constexpr int kForwardCount =
    4;  // channels of a thread: more of them leave too few warps to hide the latency of silu

template <CudaType kType, int kTaps>
__global__ void __launch_bounds__(kThreads, 6)
    short_conv_kernel(const __grid_constant__ ShortConvCudaParams p, const int block_tokens) {
  constexpr int kCount = kForwardCount;
  using Word = typename Bits<kCount>::Word;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (channel >= p.channels) return;
  const Sequences sequences{p.cu_seqlens, p.wide_seqlens, p.sequences, p.tokens};
  int64_t t = static_cast<int64_t>(blockIdx.y) * block_tokens;
  const int64_t stop = min(t + block_tokens, p.tokens);
  float w[kCount][kTaps];
  load_weights(p, channel, w);
  const uint16_t* u = static_cast<const uint16_t*>(p.u.data) + channel;
  uint16_t* y = static_cast<uint16_t*>(p.y) + channel;
  const auto read = [&](int64_t token) {
    return __ldcs(reinterpret_cast<const Word*>(u + token * p.u.stride));
  };
  int n = sequences.find(t);
  while (t < stop) {
    while (sequences.begin(n + 1) <= t) ++n;  // over empty sequences too
    const int64_t begin = sequences.begin(n);
    const int64_t end = min(sequences.begin(n + 1), stop);
    float window[kTaps - 1][kCount];
    load_window<kType, kTaps, kCount>(p, begin, t - begin, slot_of(p.initial, n), channel, window);
    Word next[kBatch];
    const auto token = [&](int64_t now, const Word& bits) {
      float x[kCount];
      float sum[kCount];
      unpack<kType>(bits, x);
      step(w, x, window, sum);
      if (p.silu) apply_silu(sum);
      *reinterpret_cast<Word*>(y + now * p.y_stride) = pack<kType>(sum);
    };
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (t + i < end) next[i] = read(t + i);
    }
    for (; t + 2 * kBatch <= end; t += kBatch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Word bits = next[i];
        next[i] = read(t + i + kBatch);
        token(t + i, bits);
      }
    }
    for (; t < end; t += kBatch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (t + i >= end) break;
        const Word bits = next[i];
        if (t + i + kBatch < end) next[i] = read(t + i + kBatch);
        token(t + i, bits);
      }
    }
    t = end;
  }
}

// The last taps - 1 inputs of sequence blockIdx.y.
template <int kTaps>
__global__ void __launch_bounds__(kThreads)
    short_conv_final_kernel(const __grid_constant__ ShortConvCudaParams p) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  const int n = static_cast<int>(blockIdx.y);
  const int slot = slot_of(p.final, n);
  if (channel >= p.channels || slot < 0) return;
  const Sequences sequences{p.cu_seqlens, p.wide_seqlens, p.sequences, p.tokens};
  const int64_t begin = sequences.begin(n);
  const int64_t length = sequences.begin(n + 1) - begin;
  uint4 rows[kTaps - 1];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    rows[i] = input_bits<kTaps, uint4>(p, begin, length - (kTaps - 1) + i, slot_of(p.initial, n), channel);
  }
  uint16_t* state = static_cast<uint16_t*>(p.final.data) + slot * p.final.slot_stride + channel;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) *reinterpret_cast<uint4*>(state + i * p.channels) = rows[i];
}

template <CudaType kType, int kTaps>
__global__ void __launch_bounds__(kThreads)
    short_conv_update_kernel(const __grid_constant__ ShortConvCudaParams p) {
  constexpr int kCount = 8;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (channel >= p.channels) return;
  const int64_t n = blockIdx.y;
  const uint4 bits =
      *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.u.data) + n * p.u.stride + channel);
  const int slot = slot_of(p.final, static_cast<int>(n));
  uint16_t* state = static_cast<uint16_t*>(p.final.data) + slot * p.final.slot_stride + channel;
  uint4 rows[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    rows[i] = slot >= 0 ? *reinterpret_cast<const uint4*>(state + i * p.channels) : uint4{};
  }
  rows[kTaps - 1] = bits;
  float w[kCount][kTaps];
  load_weights(p, channel, w);
  float window[kTaps - 1][kCount];
  float x[kCount];
  float sum[kCount];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) unpack<kType>(rows[i], window[i]);
  unpack<kType>(bits, x);
  step(w, x, window, sum);
  if (p.silu) apply_silu(sum);
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.y) + n * p.y_stride + channel) = pack<kType>(sum);
  if (slot < 0) return;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) *reinterpret_cast<uint4*>(state + i * p.channels) = rows[i + 1];
}

}  // namespace

void validate(const ShortConvCudaParams& p) {
  constexpr const char* kName = "short_conv";
  check(p.channels > 0 && p.channels % 8 == 0, "{}: channels is {}, expected a multiple of 8", kName,
        p.channels);
  check(p.taps >= 2 && p.taps <= 4, "{}: taps is {}, expected 2, 3 or 4", kName, p.taps);
  check(p.sequences >= 0 && p.sequences < 65536, "{}: sequences is {}, expected 0 to 65535", kName,
        p.sequences);
  check(p.tokens >= 0 && (p.sequences > 0 || p.tokens == 0), "{}: {} tokens of {} sequences", kName, p.tokens,
        p.sequences);
  check(p.sequences == 0 || p.cu_seqlens != nullptr || p.tokens % p.sequences == 0,
        "{}: {} tokens do not divide by {} sequences", kName, p.tokens, p.sequences);
  check(p.type == CudaType::kBf16 || p.type == CudaType::kF16, "{}: u must be bfloat16 or float16", kName);
  check(p.weight != nullptr && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0,
        "{}: weight is null or not aligned to 16 bytes", kName);
  check_rows("u", p.u.data, p.u.stride, p);
  for (const ConvStates* states : {&p.initial, &p.final}) {
    check(states->data == nullptr ||
              (reinterpret_cast<uintptr_t>(states->data) % 16 == 0 && states->slot_stride % 8 == 0 &&
               states->slot_stride >= (p.taps - 1) * p.channels),
          "{}: states are not aligned to 16 bytes, or their slot_stride {} is no multiple of 8 from {} on",
          kName, states->slot_stride, (p.taps - 1) * p.channels);
  }
}

void short_conv_cuda(const ShortConvCudaParams& p, CUstream_st* stream) {
  validate(p);
  check_rows("y", p.y, p.y_stride, p);
  if (p.sequences == 0) return;
  const unsigned column_count = columns(p.channels, kForwardCount);
  const int block = tokens_per_block(p.tokens, column_count, 128);
  const int64_t blocks = (p.tokens + block - 1) / block;
  check(blocks < 65536, "short_conv: {} tokens are too many for one launch", p.tokens);
  if (p.tokens > 0) {
    dispatch(p, [&]<CudaType kType, int kTaps>() {
      short_conv_kernel<kType, kTaps>
          <<<dim3(column_count, static_cast<unsigned>(blocks)), kThreads, 0, stream>>>(p, block);
    });
    check_launch("short_conv");
  }
  if (p.final.data != nullptr) {
    dispatch(p, [&]<CudaType kType, int kTaps>() {
      short_conv_final_kernel<kTaps><<<dim3(columns(p.channels, 8), p.sequences), kThreads, 0, stream>>>(p);
    });
    check_launch("short_conv_final");
  }
}

void short_conv_update_cuda(const ShortConvCudaParams& p, CUstream_st* stream) {
  validate(p);
  check_rows("y", p.y, p.y_stride, p);
  check(p.tokens == p.sequences && p.cu_seqlens == nullptr,
        "short_conv_update: {} tokens of {} sequences, expected one each", p.tokens, p.sequences);
  check(p.final.data != nullptr && p.final.data == p.initial.data && p.final.slots == p.initial.slots,
        "short_conv_update: initial and final must be one pool with the same slots");
  if (p.sequences == 0) return;
  dispatch(p, [&]<CudaType kType, int kTaps>() {
    short_conv_update_kernel<kType, kTaps>
        <<<dim3(columns(p.channels, 8), p.sequences), kThreads, 0, stream>>>(p);
  });
  check_launch("short_conv_update");
}

}  // namespace kilin
