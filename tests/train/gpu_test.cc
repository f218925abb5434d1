// SPDX-License-Identifier: Apache-2.0
// Training on a GPU against the CPU; skipped without one (preset train-cuda, docs/architecture.md).
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "support/variants.h"
#include "train/torch_test_support.h"

namespace kilin::testing {
namespace {

using Json = nlohmann::json;
using train::KdaPath;
using train::ModelOptions;
using train::TorchModel;
using train::TrainBatch;

// Heads that the kernels have, and everything else a multiple of what they want
Config fitting(const Json& changes) {
  Json json = io::parse_json_file(reference_path("tiny-random/config.json"));
  json.merge_patch({{"hidden_size", 128}, {"linear_attn_config", {{"head_dim", 64}, {"num_heads", 2}}}});
  json.merge_patch(changes);
  return read_config(io::JsonReader(json, "fitting"), compatibility("transformers"));
}

const std::vector<std::pair<std::string, Json>>& models() {
  static const std::vector<std::pair<std::string, Json>> all{
      {"kda_64", Json::object()},
      {"kda_128", {{"linear_attn_config", {{"head_dim", 128}}}}},
      {"gdn", {{"linear_attn_config", {{"kda_layers", Json::array()}, {"gdn_layers", {1, 2, 3}}}}}},
      {"grouped_bounded_silu",
       {{"linear_attn_config",
         {{"num_value_heads", 4}, {"gate_lower_bound", -5.0}, {"output_gate", "silu"}}}}},
      {"no_gate_no_convolution",
       {{"linear_attn_config", {{"output_gate", "none"}, {"short_conv_kernel_size", 1}}}}},
      {"dense_rope", {{"num_experts", 0}, {"mla_use_nope", false}}},
      {"heads_without_kernels", {{"linear_attn_config", {{"head_dim", 32}}}}},
  };
  return all;
}

struct Result {
  at::Tensor logits;
  std::vector<at::Tensor> gradients;
};

Result result(const Config& config, const ModelOptions& options) {
  TorchModel model = TorchModel::random(config, 3, options);
  const TrainBatch batch = random_batch({150, 1, 90}, config.vocab_size, 5);
  const at::Tensor logits = model.forward(batch);
  at::cross_entropy_loss(logits, batch.tokens.roll(-1).to(options.device)).backward();
  Result r{logits.detach().cpu(), {}};
  for (const auto& p : model.parameters())
    r.gradients.push_back((p.tensor.grad().defined() ? p.tensor.grad() : at::zeros_like(p.tensor)).cpu());
  return r;
}

class Gpu : public ::testing::TestWithParam<std::pair<std::string, Json>> {
 protected:
  void SetUp() override {
    if (at::hasCUDA()) return;
    ASSERT_EQ(std::getenv("KILIN_REQUIRE_GPU"), nullptr) << "no GPU";
    GTEST_SKIP() << "no GPU";
  }
};

TEST_P(Gpu, float32_equals_the_cpu) {
  const Config config = fitting(GetParam().second);
  ModelOptions gpu;
  gpu.device = at::Device(at::kCUDA, 0);
  gpu.kda_path = KdaPath::kComposite;
  const Result ours = result(config, gpu), exact = result(config, ModelOptions{});
  EXPECT_LT(relative_error(ours.logits, exact.logits), 1e-4);
  for (size_t i = 0; i < exact.gradients.size(); ++i)
    EXPECT_LT(relative_error(ours.gradients[i], exact.gradients[i]), 1e-3) << i;
}

// In bfloat16 the kernels are about as near to the exact result as torch's operations.
TEST_P(Gpu, kernels_in_bfloat16_are_as_exact_as_torchs_operations) {
  const Config config = fitting(GetParam().second);
  const Result exact = result(config, ModelOptions{});
  ModelOptions options;
  options.device = at::Device(at::kCUDA, 0);
  options.autocast_bf16 = true;
  const Result kernels = result(config, options);
  options.kda_path = KdaPath::kComposite;
  const Result composite = result(config, options);
  EXPECT_LT(relative_error(kernels.logits, exact.logits),
            2 * relative_error(composite.logits, exact.logits) + 0.005);
  for (size_t i = 0; i < exact.gradients.size(); ++i)
    EXPECT_LT(relative_error(kernels.gradients[i], exact.gradients[i]),
              2 * relative_error(composite.gradients[i], exact.gradients[i]) + 0.01)
        << i;
}

TEST_P(Gpu, the_same_bits_every_time_and_with_recomputed_activations) {
  const Config config = fitting(GetParam().second);
  ModelOptions options;
  options.device = at::Device(at::kCUDA, 0);
  options.autocast_bf16 = true;
  const Result first = result(config, options), second = result(config, options);
  options.checkpoint_activations = true;
  const Result recomputed = result(config, options);
  for (size_t i = 0; i < first.gradients.size(); ++i) {
    EXPECT_TRUE(at::equal(first.gradients[i], second.gradients[i])) << i;
    EXPECT_TRUE(at::equal(first.gradients[i], recomputed.gradients[i])) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Fitting, Gpu, ::testing::ValuesIn(models()),
                         [](const auto& test) { return test.param.first; });

}  // namespace
}  // namespace kilin::testing
