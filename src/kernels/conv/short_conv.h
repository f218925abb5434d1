// SPDX-License-Identifier: Apache-2.0
// The causal depthwise convolution in front of KDA's q, k and v, with SiLU:
//   y_t[c] = silu(sum_{i < taps} w[c][i] u_{t - taps + 1 + i}[c]),  w[c][taps - 1] on the current token,
// inputs before a sequence's first token zero. State of a sequence: its last taps - 1 inputs u, oldest first.
#pragma once
#include <cstdint>

#include "base/thread_pool.h"

namespace kilin {

struct ShortConvParams {
  int64_t channels = 0;
  int64_t taps = 4;  // 2 to 8
  int sequences = 0;
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1] token offsets, rising from 0
  const int32_t* slots = nullptr;       // [sequences] state slot of each sequence
  const float* u = nullptr;             // [tokens][u_stride]
  int64_t u_stride = 0;
  const float* w = nullptr;  // [taps][channels]: transposed from the checkpoint's [channels][1][taps]
  float* state = nullptr;    // slot s at state + s * slot_stride: [taps - 1][channels], read and written
  int64_t slot_stride = 0;
  float* y = nullptr;  // [tokens][y_stride]; may be u
  int64_t y_stride = 0;
};

void short_conv(const ShortConvParams& params, ThreadPool& pool);

}  // namespace kilin
