// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv_backward_isa.h"

#include "kernels/cpu/vec.h"

namespace kilin::KILIN_ISA {
namespace {

// One vector of n channels, from the last token of a sequence to its first: the inputs that a token sees and
// the dz of the tokens that saw its input stay in registers.
template <int kTaps>
KILIN_INLINE void backward_column(const ShortConvBackward& p, int64_t c, int n, int64_t first, int64_t last,
                                  const Vec (&w)[kTaps], Vec (&dw)[kTaps]) {
  constexpr int kHistory = kTaps - 1;
  const auto input = [&](int64_t t) { return t >= first ? load_part(p.u + t * p.u_stride + c, n) : zero(); };
  Vec window[kTaps];                                                          // u of t - kHistory ... t
  Vec later[kHistory]{};                                                      // dz of t + 1 ... t + kHistory
  for (int i = 0; i < kHistory; ++i) window[i] = input(last - kHistory + i);  // as of t = last
  for (int64_t t = last - 1; t >= first; --t) {
    for (int i = kHistory; i > 0; --i) window[i] = window[i - 1];
    window[0] = input(t - kHistory);
    Vec z = window[0] * w[0];
    for (int i = 1; i < kTaps; ++i) z += window[i] * w[i];
    const Vec s = sigmoid(z);
    const Vec dz = load_part(p.dy + t * p.dy_stride + c, n) * s * (splat(1.0f) + z * (splat(1.0f) - s));
    Vec du = w[kHistory] * dz;
    for (int j = 0; j < kHistory; ++j) du += w[kHistory - 1 - j] * later[j];
    store_part(p.du + t * p.du_stride + c, du, n);
    for (int i = 0; i < kTaps; ++i) dw[i] += dz * window[i];
    for (int j = kHistory - 1; j > 0; --j) later[j] = later[j - 1];
    later[0] = dz;
  }
}

template <int kTaps>
KILIN_INLINE void backward_channels(const ShortConvBackward& p, int64_t c, int n) {
  Vec w[kTaps];
  Vec dw[kTaps]{};
  for (int i = 0; i < kTaps; ++i) w[i] = load_part(p.w + i * p.channels + c, n);
  for (int s = 0; s < p.sequences; ++s)
    backward_column<kTaps>(p, c, n, p.cu_seqlens[s], p.cu_seqlens[s + 1], w, dw);
  for (int i = 0; i < kTaps; ++i) store_part(p.dw + i * p.channels + c, dw[i], n);
}

template <int kTaps>
void backward_slice(const ShortConvBackward& p, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) backward_channels<kTaps>(p, c, kLanes);
  if (c < end) backward_channels<kTaps>(p, c, static_cast<int>(end - c));
}

}  // namespace

void short_conv_backward_slice(const ShortConvBackward& p, int64_t begin, int64_t end) {
  switch (p.taps) {
    case 2:
      return backward_slice<2>(p, begin, end);
    case 3:
      return backward_slice<3>(p, begin, end);
    case 4:
      return backward_slice<4>(p, begin, end);
    case 5:
      return backward_slice<5>(p, begin, end);
    case 6:
      return backward_slice<6>(p, begin, end);
    case 7:
      return backward_slice<7>(p, begin, end);
    default:
      return backward_slice<8>(p, begin, end);
  }
}

}  // namespace kilin::KILIN_ISA
