// SPDX-License-Identifier: Apache-2.0
// The Ops adapter of training: tensors are torch's, gradients come from autograd, of the delta rule and the
// convolutions from our kernels. Every batch is one of fresh sequences; there is no cache.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <string_view>
#include <vector>

#include "model/ops.h"
#include "train/sequences.h"
#include "train/torch_model.h"

namespace kilin::train {

// A parameter as the model text sees it: its values, and LoRA's two matrices where there are any.
struct TorchWeight {
  at::Tensor value;
  at::Tensor lora_a, lora_b;  // [rank][in], [out][rank]
  double lora_scale = 0.0;
};

class TorchOps {
 public:
  using Tensor = at::Tensor;
  using Weight = TorchWeight;
  std::function<void(std::string_view, int, const Tensor&)> observer;

  // Both live as long as this.
  TorchOps(const Config& config, const ModelOptions& options);

  // Checks the batch (Error). Counts the router's choices of the coming forward pass if `count`.
  void begin(const TrainBatch& batch, bool count);

  Tensor embed(const Weight& table);
  Tensor rms_norm(const Tensor& x, const Weight& w, double eps);
  Tensor linear(const Tensor& x, const Weight& w) { return product(shared_operand(x), w); }
  template <size_t N>
  std::array<Tensor, N> linears(const Tensor& x, const std::array<const Weight*, N>& w) {
    const Tensor in = shared_operand(x);
    std::array<Tensor, N> y;
    for (size_t i = 0; i < N; ++i) y[i] = product(in, *w[i]);
    return y;
  }
  Tensor short_conv(const Tensor& x, const Weight* w, int layer, ConvStream stream);
  Tensor delta_mix(const MixInputs<Tensor, Weight>& in, int layer, LayerKind kind);
  Tensor gated_rms_norm(const Tensor& x, const Weight& w, const Tensor* z);
  Tensor mla_mix(const Tensor& q, const Tensor& kv, const MlaWeights<Weight>& w, int layer);
  Tensor swiglu(const Tensor& gate, const Tensor& up);
  Tensor moe(const Tensor& x, const MoeWeights<Weight>& w, int layer);
  void add_to(Tensor& x, const Tensor& y);
  Tensor wanted_rows(const Tensor& x);
  int scope() { return 0; }
  void observe(std::string_view what, int layer, const Tensor& x) {
    if (observer) observer(what, layer, x);
  }

  // block(x), which changes x; if activations are checkpointed only x is kept for the gradients.
  using Block = std::function<void(Tensor&)>;
  void run_layer(int layer, Tensor& x, const Block& block);
  // For that, the tensors with gradients that each layer uses; they live as long as this.
  void set_leaves(const std::vector<std::vector<Tensor>>* leaves) { leaves_ = leaves; }

  std::vector<RouterCounts>& router_counts() { return counts_; }

 private:
  struct Choice {
    Tensor experts;  // int64 [rows][top_k]
    Tensor weights;  // [rows][top_k]
  };
  Tensor operand(const Tensor& x) const;  // x as matrix products take it
  // The same, and the one of the call before for the same x: projections of one x share its cast, and so the
  // sum of their gradients has the type of the products.
  Tensor shared_operand(const Tensor& x);
  Tensor exact(const Tensor& x) const;  // x as everything else takes it
  Tensor product(const Tensor& x, const Weight& w) const;
  Tensor normalized(const Tensor& x, const Tensor& w, double eps) const;
  Tensor rotated(const Tensor& x) const;
  Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v) const;
  Choice choose(const Tensor& x, const MoeWeights<Weight>& w, int layer);
  Tensor each_expert(const Tensor& x, const Tensor& counts, const std::vector<MlpWeights<Weight>>& experts);
  Tensor grouped_experts(const Tensor& x, const Tensor& counts,
                         const std::vector<MlpWeights<Weight>>& experts);

  const Config& config_;
  const ModelOptions& options_;
  Sequences sequences_;
  Tensor tokens_;
  Tensor wanted_;
  Tensor cast_from_, cast_to_;  // of shared_operand()
  bool count_ = false;
  const std::vector<std::vector<Tensor>>* leaves_ = nullptr;
  std::vector<RouterCounts> counts_;
};

static_assert(Ops<TorchOps>);

}  // namespace kilin::train
