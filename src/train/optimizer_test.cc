// SPDX-License-Identifier: Apache-2.0
#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "io/json.h"

namespace kilin::train {
namespace {

NamedTensor leaf(const std::string& name, Role role, const at::Tensor& value) {
  at::Tensor tensor = value.clone().set_requires_grad(true);
  return {name, tensor, role, tensor.sizes().vec()};
}

// One element, step by step, in double.
struct PlainAdamW {
  double p, m = 0, v = 0;
  void step(double g, double rate, double decay, const OptimizerConfig& c, int t) {
    m = c.beta1 * m + (1 - c.beta1) * g;
    v = c.beta2 * v + (1 - c.beta2) * g * g;
    const double mean = m / (1 - std::pow(c.beta1, t));
    const double square = v / (1 - std::pow(c.beta2, t));
    p -= rate * decay * p;
    p -= rate * mean / (std::sqrt(square) + c.epsilon);
  }
};

TEST(Optimizer, AdamWIsTheFormula) {
  at::manual_seed(1);
  OptimizerConfig config;
  config.weight_decay = 0.3;
  const std::vector<NamedTensor> parameters{leaf("matrix", Role::kProjection, at::randn({5, 37})),
                                            leaf("vector", Role::kVector, at::randn({101})),
                                            leaf("conv", Role::kConv, at::randn({7, 1, 4}))};
  Optimizer optimizer(config, parameters);
  std::vector<std::vector<PlainAdamW>> plain(3);
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor flat = parameters[i].tensor.detach().flatten();
    for (int64_t k = 0; k < flat.numel(); ++k) plain[i].push_back({flat[k].item<double>()});
  }
  for (int t = 1; t <= 5; ++t) {
    const double rate = 0.01 * t;
    optimizer.gradients().normal_();
    for (size_t i = 0; i < 3; ++i) {
      const at::Tensor gradient = parameters[i].tensor.grad().flatten();
      for (int64_t k = 0; k < gradient.numel(); ++k)
        plain[i][static_cast<size_t>(k)].step(gradient[k].item<double>(), rate, i == 0 ? 0.3 : 0, config, t);
    }
    optimizer.step(rate);
  }
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor flat = parameters[i].tensor.detach().flatten();
    for (int64_t k = 0; k < flat.numel(); ++k)
      EXPECT_NEAR(flat[k].item<double>(), plain[i][static_cast<size_t>(k)].p, 2e-6);
  }
}

TEST(Optimizer, OrthogonalizeBringsSingularValuesNearOne) {
  at::manual_seed(2);
  for (const auto& sizes : {std::vector<int64_t>{3, 40, 24}, {2, 24, 40}, {1, 32, 32}}) {
    const at::Tensor x = at::randn(sizes) * 1e-3;
    const at::Tensor y = orthogonalize(x);
    const at::Tensor values = at::linalg_svdvals(y);
    EXPECT_GT(values.min().item<double>(), 0.3);
    EXPECT_LT(values.max().item<double>(), 1.3);
    // The polynomial of the singular values of x, with its own singular vectors.
    const auto [u, s, v] = at::linalg_svd(x.to(at::kDouble), /*full_matrices=*/false);
    at::Tensor t = s / s.norm(2, {-1}, true);
    for (int i = 0; i < 5; ++i) t = 3.4445 * t - 4.7750 * t.pow(3) + 2.0315 * t.pow(5);
    const at::Tensor expected = at::matmul(u * t.unsqueeze(-2), v);
    EXPECT_LT((y - expected).abs().max().item<double>(), 1e-4);
  }
}

TEST(Optimizer, MuonIsTheFormula) {
  at::manual_seed(3);
  OptimizerConfig config;
  config.kind = OptimizerKind::kMuon;
  config.weight_decay = 0.1;
  const std::vector<NamedTensor> parameters{
      leaf("a", Role::kProjection, at::randn({16, 8})), leaf("b", Role::kExpert, at::randn({16, 8})),
      leaf("c", Role::kRouter, at::randn({4, 8})), leaf("embedding", Role::kEmbedding, at::randn({16, 8}))};
  Optimizer optimizer(config, parameters);
  std::vector<at::Tensor> expected, momenta;
  for (const NamedTensor& p : parameters) {
    expected.push_back(p.tensor.detach().to(at::kDouble));
    momenta.push_back(at::zeros_like(expected.back()));
  }
  for (int t = 0; t < 3; ++t) {
    optimizer.gradients().normal_();
    for (size_t i = 0; i < 3; ++i) {
      const at::Tensor g = parameters[i].tensor.grad().to(at::kDouble);
      momenta[i] = momenta[i] * 0.95 + g;
      const at::Tensor update = orthogonalize((g + 0.95 * momenta[i]).unsqueeze(0))[0];
      const double larger = i == 2 ? 8 : 16;
      expected[i] = expected[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * std::sqrt(larger) * update;
    }
    optimizer.step(0.02);
  }
  for (size_t i = 0; i < 3; ++i)
    EXPECT_LT((parameters[i].tensor.detach() - expected[i]).abs().max().item<double>(), 1e-5) << i;
  // The embedding is AdamW's: steps of about the rate each.
  EXPECT_LT((parameters[3].tensor.detach() - expected[3]).abs().max().item<double>(), 0.1);
  EXPECT_EQ(optimizer.state().size(), 5u);
}

TEST(Optimizer, ClipsTheNormOfAllGradients) {
  OptimizerConfig config;
  config.clip = 2;
  const std::vector<NamedTensor> parameters{leaf("a", Role::kProjection, at::zeros({2, 2})),
                                            leaf("b", Role::kVector, at::zeros({5}))};
  Optimizer optimizer(config, parameters);
  optimizer.gradients().fill_(2);
  EXPECT_NEAR(optimizer.clip_gradients(), 6, 1e-6);
  EXPECT_NEAR(optimizer.gradients().norm().item<double>(), 2, 1e-5);
  EXPECT_NEAR(parameters[1].tensor.grad()[0].item<double>(), 2.0 / 3, 1e-6);
  EXPECT_NEAR(optimizer.clip_gradients(), 2, 1e-5);
}

TEST(Optimizer, SavedStateGoesOnToTheBit) {
  for (const OptimizerKind kind : {OptimizerKind::kAdamW, OptimizerKind::kMuon}) {
    OptimizerConfig config;
    config.kind = kind;
    at::manual_seed(5);
    const at::Tensor a = at::randn({9, 6}), b = at::randn({11});
    const auto make = [&] {
      return std::vector<NamedTensor>{leaf("a", Role::kProjection, a), leaf("b", Role::kVector, b)};
    };
    const std::vector<NamedTensor> first = make();
    Optimizer one(config, first);
    const auto gradients = [](Optimizer& optimizer, int step) {
      at::manual_seed(100 + step);
      optimizer.gradients().normal_();
    };
    for (int t = 0; t < 3; ++t) gradients(one, t), one.step(0.01);
    std::vector<NamedTensor> second = make();
    Optimizer other(config, second);
    const auto from = one.state(), to = other.state();
    ASSERT_EQ(from.size(), to.size());
    for (size_t i = 0; i < from.size(); ++i) {
      EXPECT_EQ(from[i].first, to[i].first);
      to[i].second.copy_(from[i].second);
    }
    other.restore(one.updates());
    for (size_t i = 0; i < 2; ++i) second[i].tensor.detach().copy_(first[i].tensor.detach());
    for (int t = 3; t < 6; ++t) {
      gradients(one, t), one.step(0.01);
      gradients(other, t), other.step(0.01);
    }
    for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(at::equal(first[i].tensor, second[i].tensor));
  }
}

// Ten steps of transformers and torch.optim.AdamW on the same weights and tokens.
TEST(Optimizer, TrainsLikeTransformersWithAdamW) {
  const std::string reference = std::string(KILIN_SOURCE_DIR) + "/tests/data/reference/";
  const auto golden = io::parse_json_file(reference + "goldens/tiny_random_adamw.json");
  TorchModel model = TorchModel::load(reference + "tiny-random", {});
  OptimizerConfig config;
  config.beta2 = golden["optimiser"]["betas"][1];
  config.weight_decay = golden["optimiser"]["weight_decay"];
  config.decay_all = true;
  config.clip = golden["optimiser"]["clip_total_grad_norm"];
  Optimizer optimizer(config, model.parameters());
  TrainBatch batch;
  batch.cu_seqlens = {0};
  std::vector<int64_t> tokens, labels;
  for (const auto& sequence : golden["input_ids"]) {
    for (size_t i = 0; i + 1 < sequence.size(); ++i) {
      tokens.push_back(sequence[i]);
      labels.push_back(sequence[i + 1]);
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(tokens.size()));
  }
  batch.tokens = at::tensor(tokens, at::kLong);
  const at::Tensor wanted = at::tensor(labels, at::kLong);
  const auto loss_now = [&] { return at::cross_entropy_loss(model.forward(batch), wanted); };
  for (const auto& step : golden["steps"]) {
    optimizer.zero_gradients();
    const at::Tensor loss = loss_now();
    loss.backward();
    EXPECT_NEAR(loss.item<double>(), step["loss"].get<double>(), 5e-5);
    const double norm = step["grad_norm_before_clipping"];
    EXPECT_NEAR(optimizer.clip_gradients(), norm, 5e-4 * norm);
    optimizer.step(golden["optimiser"]["lr"]);
  }
  const c10::NoGradGuard no_grad;
  EXPECT_NEAR(loss_now().item<double>(), golden["loss_after_last_step"].get<double>(), 5e-5);
}

}  // namespace
}  // namespace kilin::train
