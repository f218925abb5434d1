// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/conv/short_conv_isa.h"

namespace kilin {

void short_conv(const ShortConvParams& p, ThreadPool& pool) {
  check(p.taps >= 2 && p.taps <= 8, "short convolution: found {} taps, expected 2 to 8", p.taps);
  const auto slice = KILIN_DISPATCH(short_conv_slice);
  const int64_t tokens = p.sequences > 0 ? p.cu_seqlens[p.sequences] : 0;
  // Pieces of 256 channels, of 64 where some threads would get none; one piece for a whole decode step of a
  // small model.
  const int64_t wide = p.sequences * (p.channels / 256) >= 2 * static_cast<int64_t>(pool.size()) ? 256 : 64;
  const int64_t width = tokens * p.channels < 16 * 1024 ? p.channels : wide;
  const int64_t slices = (p.channels + width - 1) / width;
  pool.parallel_for(p.sequences * slices, [&](int64_t i, int) {
    const int64_t begin = i % slices * width;
    slice(p, static_cast<int>(i / slices), begin, std::min(p.channels, begin + width));
  });
}

}  // namespace kilin
