// SPDX-License-Identifier: Apache-2.0
// Gradients of TorchOps: against complex steps of the oracle for every element of every parameter, against
// transformers' (goldens), the kernels against the composite, with and without kept activations.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>

#include <complex>
#include <fstream>
#include <nlohmann/json.hpp>

#include "support/variants.h"
#include "train/torch_test_support.h"

namespace kilin::testing {
namespace {

using Json = nlohmann::json;
using train::ModelOptions;
using train::TorchModel;
using train::TrainBatch;
using Complex = std::complex<double>;

ModelOptions exact_options() {
  ModelOptions options;
  options.dtype = at::kDouble;
  return options;
}

void clear_gradients(const TorchModel& model) {
  for (const auto& p : model.parameters()) p.tensor.mutable_grad() = at::Tensor();
  for (const auto& p : model.lora_parameters()) p.tensor.mutable_grad() = at::Tensor();
}

at::Tensor gradient(const train::NamedTensor& p) {
  return p.tensor.grad().defined() ? p.tensor.grad() : at::zeros_like(p.tensor);
}

// Mean cross entropy of each sequence's next tokens
at::Tensor next_token_loss(TorchModel& model, const TrainBatch& batch) {
  std::vector<int64_t> rows, targets;
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    for (int64_t r = batch.cu_seqlens[s]; r + 1 < batch.cu_seqlens[s + 1]; ++r) rows.push_back(r);
  }
  TrainBatch wanted = batch;
  wanted.wanted = at::tensor(rows, at::kLong);
  const at::Tensor logits = model.forward(wanted);
  return at::cross_entropy_loss(logits, batch.tokens.index_select(0, wanted.wanted + 1));
}

// A model of some thousand parameters
Config tiny(const Json& changes) {
  Json json = io::parse_json_file(reference_path("tiny-random/config.json"));
  json.merge_patch({{"vocab_size", 7},
                    {"hidden_size", 6},
                    {"intermediate_size", 5},
                    {"moe_intermediate_size", 4},
                    {"num_experts", 4},
                    {"num_hidden_layers", 2},
                    {"kv_lora_rank", 4},
                    {"qk_nope_head_dim", 3},
                    {"qk_rope_head_dim", 2},
                    {"v_head_dim", 3},
                    {"linear_attn_config",
                     {{"full_attn_layers", {2}}, {"kda_layers", {1}}, {"head_dim", 4}, {"num_heads", 2}}}});
  json.merge_patch(changes);
  return read_config(io::JsonReader(json, "tiny"), compatibility("transformers"));
}

const std::vector<std::pair<std::string, Json>>& tiny_models() {
  static const std::vector<std::pair<std::string, Json>> all{
      {"kimi_linear", Json::object()},
      {"grouped_bounded_silu_rope_tied",
       {{"linear_attn_config",
         {{"num_heads", 1},
          {"num_value_heads", 2},
          {"value_head_dim", 3},
          {"gate_lower_bound", -3.0},
          {"output_gate", "silu"}}},
        {"mla_use_nope", false},
        {"tie_word_embeddings", true},
        {"moe_router_activation_func", "softmax"},
        {"num_expert_group", 2}}},
      {"gdn_without_gate_and_convolution",
       {{"linear_attn_config",
         {{"kda_layers", Json::array()},
          {"gdn_layers", {1}},
          {"output_gate", "none"},
          {"short_conv_kernel_size", 1}}},
        {"num_shared_experts", 0},
        {"first_k_dense_replace", 0},
        {"moe_renormalize", false}}},
  };
  return all;
}

class ComplexStep : public ::testing::TestWithParam<std::pair<std::string, Json>> {};

// d loss / d element = Im loss(element + ih) / h without any cancellation
TEST_P(ComplexStep, equals_the_gradient_of_every_parameter) {
  const Config config = tiny(GetParam().second);
  TorchModel model = TorchModel::random(config, 11, exact_options());
  disturb(model, 12);
  const TrainBatch batch = random_batch({6, 1, 4}, config.vocab_size, 2);
  const at::Tensor weights = oracle_logits<double>(model, batch).sin();  // of the logits in the loss
  (model.forward(batch) * weights).sum().backward();

  auto moved = oracle_weights<Complex>(model);
  const auto loss = [&] {
    const auto logits = oracle_forward<Complex>(config, moved, batch);
    Complex sum = 0;
    for (size_t i = 0; i < logits.v.size(); ++i) sum += logits.v[i] * weights.data_ptr<double>()[i];
    return sum;
  };
  constexpr double kStep = 1e-40;
  size_t number = 0;
  visit_parameters(moved, config, [&](const Parameter& p, Matrix<Complex>& w) {
    const auto& ours = model.parameters()[number++];
    at::Tensor exact = at::empty({static_cast<int64_t>(w.v.size())}, at::kDouble);
    for (size_t i = 0; i < w.v.size(); ++i) {
      w.v[i] += Complex(0, kStep);
      exact.data_ptr<double>()[i] = loss().imag() / kStep;
      w.v[i] = w.v[i].real();
    }
    EXPECT_LT(relative_error(gradient(ours).flatten(), exact), 1e-9) << p.name;
    const bool steers = p.name.ends_with("correction_bias") || p.role == Role::kExpert;
    EXPECT_TRUE(steers || exact.norm().item<double>() > 1e-6) << p.name << " has no influence";
  });
}

INSTANTIATE_TEST_SUITE_P(Tiny, ComplexStep, ::testing::ValuesIn(tiny_models()),
                         [](const auto& test) { return test.param.first; });

class KernelGradients : public ::testing::TestWithParam<Variant> {};

TEST_P(KernelGradients, float32_kernels_agree_with_the_float64_composite) {
  const Config config = config_of(GetParam(), "transformers");
  TorchModel exact = TorchModel::random(config, 3, exact_options());
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  const TrainBatch batch = random_batch({40, 1, 21}, config.vocab_size, 5);
  next_token_loss(exact, batch).backward();
  next_token_loss(model, batch).backward();
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const auto& p = model.parameters()[i];
    EXPECT_LT(relative_error(gradient(p), gradient(exact.parameters()[i])), 1e-3) << p.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Variant, KernelGradients, ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name; });

TEST(Gradients, equal_those_of_transformers) {
  const Golden golden("tiny_random_gradients");
  const auto ids = Golden("tiny_random_t130").ids("input_ids");
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    ModelOptions options;
    options.dtype = type;
    TorchModel model = TorchModel::load(reference_path("tiny-random"), options);
    next_token_loss(model, batch_of({ids})).backward();
    size_t compared = 0;
    for (const auto& p : model.parameters()) {
      if (!golden.contains("grad." + p.name)) continue;
      const auto expected = golden.floats("grad." + p.name);
      EXPECT_LT(relative_error(gradient(p).flatten(), at::tensor(expected)), 1e-4) << p.name;
      ++compared;
    }
    EXPECT_GE(compared, model.parameters().size() - 3);  // the routers' biases have none
  }
}

// AdamW as torch.optim has it (decoupled decay, arXiv:1711.05101)
struct AdamW {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, decay = 0;
  int64_t step = 0;
  std::vector<at::Tensor> mean, square;

  void update(const std::vector<train::NamedTensor>& parameters, double scale) {
    const c10::NoGradGuard no_gradients;
    ++step;
    mean.resize(parameters.size());
    square.resize(parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!parameters[i].tensor.grad().defined()) continue;
      const at::Tensor g = parameters[i].tensor.grad() * scale, x = parameters[i].tensor.detach();
      if (!mean[i].defined()) mean[i] = at::zeros_like(g), square[i] = at::zeros_like(g);
      x.mul_(1 - lr * decay);
      mean[i] = beta1 * mean[i] + (1 - beta1) * g;
      square[i] = beta2 * square[i] + (1 - beta2) * g * g;
      const double t = static_cast<double>(step);
      const at::Tensor denominator = (square[i] / (1 - std::pow(beta2, t))).sqrt() + eps;
      x.sub_(mean[i] / (1 - std::pow(beta1, t)) / denominator, lr);
    }
  }
};

TEST(Gradients, ten_steps_of_AdamW_are_those_of_transformers) {
  std::ifstream file(reference_path("goldens/tiny_random_adamw.json"));
  const Json golden = Json::parse(file);
  const Json& settings = golden["optimiser"];
  const TrainBatch batch = batch_of(golden["input_ids"].get<std::vector<std::vector<int32_t>>>());
  ASSERT_EQ(golden["steps"].size(), 10U);
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    AdamW optimiser;
    optimiser.lr = settings["lr"];
    optimiser.beta1 = settings["betas"][0];
    optimiser.beta2 = settings["betas"][1];
    optimiser.eps = settings["eps"];
    optimiser.decay = settings["weight_decay"];
    ModelOptions options;
    options.dtype = type;
    TorchModel model = TorchModel::load(reference_path("tiny-random"), options);
    for (const Json& step : golden["steps"]) {
      clear_gradients(model);
      const at::Tensor loss = next_token_loss(model, batch);
      loss.backward();
      double norm = 0.0;
      for (const auto& p : model.parameters()) norm += std::pow(gradient(p).norm().item<double>(), 2);
      norm = std::sqrt(norm);
      // The sign of a tiny gradient decides about a whole step: rounding spreads quickly.
      EXPECT_NEAR(loss.item<double>(), step["loss"].get<double>(), type == at::kDouble ? 1e-5 : 1e-4);
      EXPECT_NEAR(norm / step["grad_norm_before_clipping"].get<double>(), 1.0, 1e-3);
      optimiser.update(model.parameters(), std::min(1.0, 1.0 / (norm + 1e-6)));
    }
  }
}

TEST(Gradients, packed_sequences_have_those_of_the_sequences_alone) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel packed = TorchModel::random(config, 3, ModelOptions{});
  TorchModel alone = TorchModel::random(config, 3, ModelOptions{});
  const std::vector<std::vector<int32_t>> sequences{random_ids(17, config.vocab_size, 1),
                                                    random_ids(40, config.vocab_size, 2)};
  packed.forward(batch_of(sequences)).square().sum().backward();
  for (const auto& ids : sequences) alone.forward(batch_of({ids})).square().sum().backward();
  for (size_t i = 0; i < packed.parameters().size(); ++i) {
    const auto& p = packed.parameters()[i];
    EXPECT_LT(relative_error(gradient(p), gradient(alone.parameters()[i])), 1e-4) << p.name;
  }
}

std::vector<at::Tensor> gradients_of(const Config& config, bool checkpointed, bool lora, bool autocast) {
  ModelOptions options;
  options.checkpoint_activations = checkpointed;
  options.autocast_bf16 = autocast;
  TorchModel model = TorchModel::random(config, 3, options);
  if (lora) {
    model.add_lora({{"q_proj", "f_b_proj", "kv_b_proj", "w2"}, 3, 6.0, 1});
    for (const auto& p : model.lora_parameters()) p.tensor.detach().add_(0.01);
  }
  const at::Tensor loss = next_token_loss(model, random_batch({40, 1, 21}, config.vocab_size, 5));
  loss.backward();
  std::vector<at::Tensor> all{loss.detach()};
  for (const auto& list : {model.parameters(), model.lora_parameters()}) {
    for (const auto& p : list) all.push_back(gradient(p));
  }
  for (const auto& layer : model.router_counts()) all.push_back(layer.counts);
  return all;
}

TEST(Gradients, recomputed_activations_give_the_same_bits) {
  for (const size_t variant : {0, 2, 19}) {
    const Config config = config_of(variants()[variant], "transformers");
    for (const bool lora : {false, true}) {
      for (const bool autocast : {false, true}) {
        const auto kept = gradients_of(config, false, lora, autocast);
        const auto again = gradients_of(config, true, lora, autocast);
        ASSERT_EQ(kept.size(), again.size());
        for (size_t i = 0; i < kept.size(); ++i)
          EXPECT_TRUE(at::equal(kept[i], again[i])) << variants()[variant].name << " " << i;
      }
    }
  }
}

TEST(Gradients, bfloat16_products_stay_near_float32) {
  const Config config = config_of(variants()[0], "transformers");
  const auto exact = gradients_of(config, false, false, false);
  const auto rounded = gradients_of(config, false, false, true);
  EXPECT_NEAR(exact[0].item<double>(), rounded[0].item<double>(), 0.02);
  EXPECT_FALSE(at::equal(exact[0], rounded[0]));
  EXPECT_LT(relative_error(rounded[1], exact[1]), 0.05);  // of the embedding
}

}  // namespace
}  // namespace kilin::testing
