// SPDX-License-Identifier: Apache-2.0
// AdamW and Muon over the parameters of a TorchModel. State is float32 and can be saved and restored to the
// bit.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "train/config.h"
#include "train/torch_model.h"

namespace kilin::train {

// The orthogonal matrix nearest to each of x [n][rows][cols], approximately: five steps of the quintic
// Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X, (a, b, c) = (3.4445, -4.7750, 2.0315), from
// X / |X| (Jordan et al., kellerjordan.github.io/posts/muon). Singular values come out between 0.68 and 1.13
// or so. In bfloat16 on GPUs, as published; in float32 on the CPU.
at::Tensor orthogonalize(const at::Tensor& x);

class Optimizer {
 public:
  // Trains those of `parameters` that require gradients. Their gradients become pieces of one buffer, zero at
  // first; do not replace them.
  //   adamw  p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)
  //   muon   for projections, experts and the router: m <- momentum m + g,
  //          p -= lr (0.2 sqrt(max(rows, cols)) orthogonalize(g + momentum m) + weight_decay p)
  //          (Moonlight, arXiv 2502.16982, section 2.2), AdamW for all else
  // Weight decay is for matrices (embedding and head included), not for vectors and convolutions, unless
  // decay_all says so.
  Optimizer(const OptimizerConfig& config, const std::vector<NamedTensor>& parameters);

  // All gradients one after the other, float32 or the parameters' type.
  at::Tensor& gradients() { return gradients_; }
  void zero_gradients() { gradients_.zero_(); }
  // The norm of all gradients; above `clip` they are scaled down to it (0: never).
  double clip_gradients();
  void step(double rate);
  int64_t updates() const { return updates_; }

  // What has to be saved besides updates(): views, in an order that depends on the parameters only. Names are
  // "first.NAME" and "second.NAME" (AdamW), "momentum.NAME" (Muon).
  std::vector<std::pair<std::string, at::Tensor>> state() const;
  // Called after the tensors of state() have been filled.
  void restore(int64_t updates) { updates_ = updates; }

 private:
  struct Group {  // AdamW, as lists that a fused kernel takes
    std::vector<at::Tensor> parameters, gradients, first, second;
  };
  struct Matrices {  // Muon: of one shape
    std::vector<at::Tensor> parameters, gradients, momenta;
  };
  void adamw(const Group& group, double rate, double weight_decay);
  void muon(const Matrices& matrices, double rate) const;

  OptimizerConfig config_;
  std::vector<NamedTensor> trained_;
  std::vector<bool> by_muon_;  // [trained_]
  at::Tensor gradients_;
  std::vector<at::Tensor> first_, second_;  // [trained_]; second_ undefined under Muon
  Group decayed_, plain_;
  std::vector<Matrices> matrices_;
  at::Tensor step_;  // float32 scalar on the device, for the fused kernel
  int64_t updates_ = 0;
};

}  // namespace kilin::train
