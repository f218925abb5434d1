// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/norm/norm.h"

namespace kilin::train {

// Norm of each head's output times the activated gate, by our kernel with gradients (norm_cuda.h): x, z
// [rows][heads * width] bfloat16 on a Hopper GPU, w [width] float32. None if it has no kernel for the case.
std::optional<at::Tensor> gated_norm_cuda(const at::Tensor& x, const at::Tensor& w, double eps,
                                          const at::Tensor* z, GateActivation activation);

}  // namespace kilin::train
