// SPDX-License-Identifier: Apache-2.0
// The causal depthwise convolution with SiLU of kernels/conv/short_conv.h, with gradients.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "train/sequences.h"

namespace kilin::train {

// x [rows][channels], w [channels][1][taps]; any floating type and device.
at::Tensor short_convolution(const at::Tensor& x, const at::Tensor& w, const Sequences& sequences);

// By our kernel on Hopper GPUs (bfloat16, 2 to 4 taps, channels a multiple of 8); none for other cases.
std::optional<at::Tensor> short_convolution_cuda(const at::Tensor& x, const at::Tensor& w,
                                                 const Sequences& sequences);

}  // namespace kilin::train
