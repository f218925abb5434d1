// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace kilin::train {

// y = x after block(y), without what lies between: for the gradient the block is computed again from x, with
// `again`. The gradients are the same bits as without (if the block's values are). `leaves`: all tensors that
// require gradients and that the block uses.
at::Tensor recompute(const std::function<void(at::Tensor&)>& block,
                     const std::function<void(at::Tensor&)>& again, const std::vector<at::Tensor>& leaves,
                     const at::Tensor& x);

}  // namespace kilin::train
