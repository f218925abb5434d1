// SPDX-License-Identifier: Apache-2.0
#include "train/short_convolution.h"

#include <ATen/ATen.h>

namespace kilin::train {

at::Tensor short_convolution(const at::Tensor& x, const at::Tensor& w, const Sequences& sequences) {
  const at::Tensor kernel = w.view({w.size(0), -1}).to(x.dtype());
  const int64_t taps = kernel.size(1);
  at::Tensor y = x * kernel.select(1, taps - 1);
  for (int64_t back = 1; back < std::min(taps, x.size(0)); ++back) {
    // the rows `back` earlier, zero where the sequence had not begun
    at::Tensor earlier = at::constant_pad_nd(x.narrow(0, 0, x.size(0) - back), {0, 0, back, 0});
    if (sequences.count() > 1) earlier = earlier * (sequences.positions >= back).to(x.dtype()).unsqueeze(1);
    y = y + earlier * kernel.select(1, taps - 1 - back);
  }
  return at::silu(y);
}

}  // namespace kilin::train
