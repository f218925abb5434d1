// SPDX-License-Identifier: Apache-2.0
// In the place of kernels_cuda.cc in builds without CUDA.
#include "base/error.h"
#include "train/delta_mix.h"
#include "train/gated_norm.h"
#include "train/short_convolution.h"

namespace kilin::train {

std::string delta_mix_cuda_obstacle(const KdaParams&, at::Device) {
  return "this build has no CUDA kernels (KILIN_CUDA)";
}

at::Tensor delta_mix_cuda(const DeltaMix&, const Sequences&) { fail("this build has no CUDA kernels"); }

std::optional<at::Tensor> short_convolution_cuda(const at::Tensor&, const at::Tensor&, const Sequences&) {
  return std::nullopt;
}

std::optional<at::Tensor> gated_norm_cuda(const at::Tensor&, const at::Tensor&, double, const at::Tensor*,
                                          GateActivation) {
  return std::nullopt;
}

}  // namespace kilin::train
