// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/float16.h"
#include "io/checkpoint.h"
#include "kernels/matmul/matmul.h"
#include "kernels/moe/moe.h"
#include "model/parameters.h"

namespace kilin {

// A parameter as the engine computes with it: matrices stay where the file is mapped, in their own type;
// vectors and convolutions (transposed to [taps][channels]) are small and become float32.
struct Weight {
  WeightMatrix matrix;
  const float* vector = nullptr;
};

struct NamedWeight {
  Parameter parameter;
  std::string source;  // tensor name in the checkpoint
  TensorView view;
};

// A model's weights and what keeps them alive.
class LoadedModel {
 public:
  // Finds every parameter in the checkpoint, checks shapes and types, and refuses tensors that no parameter
  // uses.
  static LoadedModel load(Config config, io::Checkpoint checkpoint);
  // bfloat16 matrices of uniform random values with deviation 0.02.
  static LoadedModel random(Config config, uint64_t seed);

  const Config& config() const { return config_; }
  const ModelWeights<Weight>& weights() const { return weights_; }
  const std::vector<ExpertWeights>& experts(int layer) const { return experts_[static_cast<size_t>(layer)]; }
  const std::optional<ExpertWeights>& shared(int layer) const { return shared_[static_cast<size_t>(layer)]; }
  const std::vector<NamedWeight>& table() const { return table_; }
  // Name of the first tensor with a NaN or infinity, or "". Reads all weights.
  std::string first_not_finite() const;

 private:
  explicit LoadedModel(Config config);
  float* keep_floats(int64_t n);
  Weight bind(const Parameter& parameter, const TensorView& view);
  void collect_experts();

  Config config_;
  ModelWeights<Weight> weights_;
  std::vector<NamedWeight> table_;
  std::vector<std::vector<ExpertWeights>> experts_;
  std::vector<std::optional<ExpertWeights>> shared_;
  std::optional<io::Checkpoint> checkpoint_;
  std::deque<std::vector<float>> floats_;
  std::vector<std::unique_ptr<BFloat16[]>> random_;
};

}  // namespace kilin
