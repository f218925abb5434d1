// SPDX-License-Identifier: Apache-2.0
// Private to the TorchModel.
#pragma once
#include "train/torch_ops.h"

namespace kilin::train {

class TorchModel::Impl {
 public:
  // Parameters without values, all of them leaves.
  Impl(const Config& config, const ModelOptions& options);
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // Calls f(table entry, weight) in the order of parameters().
  template <class F>
  void visit(F&& f) {  // NOLINT(cppcoreguidelines-missing-std-forward)
    visit_parameters(weights, config, f);
  }
  // Overwrites parameter number i.
  void set(size_t i, const std::vector<float>& values);
  // Whether parameters (LoRA matrices if there are any) require gradients, and the lists of them by layer.
  void set_trainable();

  Config config;
  ModelOptions options;
  std::string text;  // config.json
  ModelWeights<TorchWeight> weights;
  std::vector<NamedTensor> parameters;
  std::vector<NamedTensor> lora;
  std::optional<LoraOptions> lora_options;
  std::vector<std::vector<at::Tensor>> leaves;  // of each layer, with gradients
  TorchOps ops;
};

}  // namespace kilin::train
