// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv_isa.h"

#include "kernels/cpu/vec.h"

namespace kilin::KILIN_ISA {
namespace {

// Tokens and channels of one block: their lines stay in L1, and the rows of a block are runs of 1 KB, where a
// single vector of channels walking down all tokens would touch a page per line.
constexpr int64_t kBlockTokens = 8;
constexpr int64_t kBlockChannels = 256;

// kBlockTokens (or fewer) tokens of one vector of channels, with the last kTaps - 1 inputs in registers, so
// that y may be u.
template <int kTaps>
KILIN_INLINE void conv_column(const ShortConvParams& p, int64_t c, int n, int64_t first, int64_t last,
                              float* state) {
  constexpr int kHistory = kTaps - 1;
  Vec past[kHistory];
  Vec w[kTaps];
  for (int i = 0; i < kTaps; ++i) w[i] = load_part(p.w + i * p.channels + c, n);
  for (int i = 0; i < kHistory; ++i) past[i] = load_part(state + i * p.channels + c, n);
  for (int64_t t = first; t < last; ++t) {
    const Vec now = load_part(p.u + t * p.u_stride + c, n);
    Vec sum = now * w[kHistory];
    for (int i = 0; i < kHistory; ++i) sum += past[i] * w[i];
    for (int i = 0; i + 1 < kHistory; ++i) past[i] = past[i + 1];
    past[kHistory - 1] = now;
    store_part(p.y + t * p.y_stride + c, silu(sum), n);
  }
  for (int i = 0; i < kHistory; ++i) store_part(state + i * p.channels + c, past[i], n);
}

template <int kTaps>
void conv_slice(const ShortConvParams& p, int sequence, int64_t begin, int64_t end) {
  const int64_t last = p.cu_seqlens[sequence + 1];
  float* state = p.state + p.slots[sequence] * p.slot_stride;
  for (int64_t from = begin; from < end; from += kBlockChannels) {
    const int64_t to = from + kBlockChannels < end ? from + kBlockChannels : end;
    for (int64_t t = p.cu_seqlens[sequence]; t < last; t += kBlockTokens) {
      const int64_t stop = t + kBlockTokens < last ? t + kBlockTokens : last;
      for (int64_t ahead = stop; ahead < stop + kBlockTokens && ahead < last; ++ahead) {
        for (int64_t c = from; c < to; c += 16) __builtin_prefetch(p.u + ahead * p.u_stride + c, 0, 2);
      }
      int64_t c = from;
      for (; c + kLanes <= to; c += kLanes) conv_column<kTaps>(p, c, kLanes, t, stop, state);
      if (c < to) conv_column<kTaps>(p, c, static_cast<int>(to - c), t, stop, state);
    }
  }
}

}  // namespace

void short_conv_slice(const ShortConvParams& p, int sequence, int64_t begin, int64_t end) {
  switch (p.taps) {
    case 2:
      return conv_slice<2>(p, sequence, begin, end);
    case 3:
      return conv_slice<3>(p, sequence, begin, end);
    case 4:
      return conv_slice<4>(p, sequence, begin, end);
    case 5:
      return conv_slice<5>(p, sequence, begin, end);
    case 6:
      return conv_slice<6>(p, sequence, begin, end);
    case 7:
      return conv_slice<7>(p, sequence, begin, end);
    default:
      return conv_slice<8>(p, sequence, begin, end);
  }
}

}  // namespace kilin::KILIN_ISA
