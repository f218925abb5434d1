// SPDX-License-Identifier: Apache-2.0
// The causal depthwise convolution with SiLU of kernels/conv/short_conv.h, with gradients.
#pragma once
#include <ATen/core/Tensor.h>

#include "train/sequences.h"

namespace kilin::train {

// x [rows][channels], w [channels][1][taps]; any floating type and device.
at::Tensor short_convolution(const at::Tensor& x, const at::Tensor& w, const Sequences& sequences);

}  // namespace kilin::train
