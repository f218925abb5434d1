// SPDX-License-Identifier: Apache-2.0
// Gradients of the short convolution (short_conv.h) over fresh sequences, for training. With z the sum before
// SiLU and s = sigmoid(z):
//   dz_t = dy_t s (1 + z (1 - s)),  du_t = sum_i w[i] dz_{t + taps - 1 - i},  dw[i] = sum_t dz_t u_{t - taps
//   + 1 + i}
#pragma once
#include <cstdint>

#include "base/thread_pool.h"

namespace kilin {

struct ShortConvBackward {
  int64_t channels = 0;
  int64_t taps = 4;  // 2 to 8
  int sequences = 0;
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1] token offsets, rising from 0
  const float* u = nullptr;             // [tokens][u_stride], as in the forward pass
  int64_t u_stride = 0;
  const float* w = nullptr;   // [taps][channels], likewise
  const float* dy = nullptr;  // [tokens][dy_stride]
  int64_t dy_stride = 0;
  float* du = nullptr;  // [tokens][du_stride], overwritten
  int64_t du_stride = 0;
  float* dw = nullptr;  // [taps][channels], overwritten
};

// The bits do not depend on the number of threads.
void short_conv_backward(const ShortConvBackward& params, ThreadPool& pool);

}  // namespace kilin
