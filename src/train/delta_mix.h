// SPDX-License-Identifier: Apache-2.0
// The token mixing of KDA and GDN layers with gradients: kernels/kda, or the recurrence in torch's
// operations.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "kernels/kda/kda.h"
#include "train/sequences.h"

namespace kilin::train {

// The inputs of kernels/kda/kda.h, [rows][heads * width] without gaps; a_log [HV], dt_bias [HV * K] (GDN
// [HV]).
struct DeltaMix {
  KdaParams settings;  // dimensions, gate_kind, scalar_gate, lower_bound; l2norm and beta_is_logit hold
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& gate;
  const at::Tensor& beta;
  const at::Tensor& a_log;
  const at::Tensor& dt_bias;
};

// All in one floating type, on any device. Returns [rows][HV * V].
at::Tensor delta_mix_composite(const DeltaMix& mix, const Sequences& sequences);

// float32 on the CPU: the chunked kernel and its backward.
at::Tensor delta_mix_cpu(const DeltaMix& mix, const Sequences& sequences);

// On a Hopper GPU: q, k and v become bfloat16, and so is the result; gate and beta bfloat16 or float32. The
// states are float32. Only where there is no obstacle.
at::Tensor delta_mix_cuda(const DeltaMix& mix, const Sequences& sequences);
// Why delta_mix_cuda() cannot be used, or "".
std::string delta_mix_cuda_obstacle(const KdaParams& settings, at::Device device);

}  // namespace kilin::train
