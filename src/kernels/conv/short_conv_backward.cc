// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv_backward.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/conv/short_conv_backward_isa.h"

namespace kilin {

void short_conv_backward(const ShortConvBackward& p, ThreadPool& pool) {
  check(p.taps >= 2 && p.taps <= 8, "short convolution: found {} taps, expected 2 to 8", p.taps);
  const auto slice = KILIN_DISPATCH(short_conv_backward_slice);
  constexpr int64_t kWidth = 64;  // channels of one task, through all sequences
  pool.parallel_for((p.channels + kWidth - 1) / kWidth,
                    [&](int64_t i, int) { slice(p, i * kWidth, std::min(p.channels, (i + 1) * kWidth)); });
}

}  // namespace kilin
