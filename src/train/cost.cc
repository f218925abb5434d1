// SPDX-License-Identifier: Apache-2.0
#include "train/cost.h"

#include <algorithm>

#include "model/parameters.h"

namespace kilin::train {
namespace {

constexpr double kFloatBytes = 4;

// LoraOptions::patterns of torch_model.h, but those with * and ?: of them the whole name would be needed.
bool is_target(const Parameter& p, const LoraConfig& lora) {
  return std::any_of(lora.targets.begin(), lora.targets.end(), [&](const std::string& target) {
    if (target == "all-linear") return p.role == Role::kProjection || p.role == Role::kExpert;
    return p.name.ends_with("." + target + ".weight") || p.name == target + ".weight";
  });
}

// Forward, of one token, without the matrices.
double mixing_flops(const Config& c, double length) {
  const double linear_layers = static_cast<double>(c.layer_count() - c.count(LayerKind::kMla));
  const double state = static_cast<double>(c.linear.value_heads * c.linear.key_dim * c.linear.value_dim);
  const double channels =
      static_cast<double>(2 * c.linear.heads * c.linear.key_dim + c.linear.value_heads * c.linear.value_dim);
  const double taps = c.linear.conv_taps > 1 ? static_cast<double>(c.linear.conv_taps) : 0;
  const double width = static_cast<double>(c.mla.heads * (c.mla.nope + c.mla.rope + c.mla.value));
  const double full_layers = static_cast<double>(c.count(LayerKind::kMla));
  return linear_layers * (6 * state + 2 * taps * channels) + full_layers * 2 * width * length / 2;
}

}  // namespace

TrainingCost training_cost(const TrainConfig& config) {
  struct Nothing {};
  const Config& shape = config.model.shape;
  TrainingCost cost;
  double trained = 0;
  double second_moments = 0;
  ModelWeights<Nothing> weights(shape);
  visit_parameters(weights, shape, [&](const Parameter& p, const Nothing&) {
    const int64_t count = element_count(p.shape);
    cost.parameters += count;
    const bool matrix = p.role == Role::kProjection || p.role == Role::kExpert || p.role == Role::kRouter;
    const bool muon = config.optimizer.kind == OptimizerKind::kMuon && matrix;
    if (config.lora) {
      if (is_target(p, *config.lora)) {
        const double added = static_cast<double>(config.lora->rank * (p.shape[0] + p.shape[1]));
        trained += added;
        second_moments += muon ? 0 : added;
      }
    } else {
      trained += static_cast<double>(count);
      second_moments += muon ? 0 : static_cast<double>(count);
    }
    if (p.role == Role::kExpert) {
      cost.active += count * shape.moe.top_k / shape.moe.experts;
    } else if (p.role != Role::kEmbedding || shape.tied_head) {
      cost.active += count;
    }
  });
  cost.flops_per_token = 3 * (2 * static_cast<double>(cost.active) +
                              mixing_flops(shape, static_cast<double>(config.data.sequence)));
  cost.bytes_weights = kFloatBytes * static_cast<double>(cost.parameters);
  cost.bytes_gradients = kFloatBytes * trained;
  cost.bytes_optimizer = kFloatBytes * (trained + second_moments);
  return cost;
}

}  // namespace kilin::train
