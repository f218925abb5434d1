// SPDX-License-Identifier: Apache-2.0
// TorchOps forward: against the oracle in double, against the engine in float32; packed batches; bad batches.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/random.h"
#include "oracle/scalar_ops.h"
#include "support/variants.h"
#include "train/torch_test_support.h"

namespace kilin::testing {
namespace {

using train::ModelOptions;
using train::TorchModel;
using train::TrainBatch;

ModelOptions exact_options(const std::string& compat = "transformers") {
  ModelOptions options;
  options.dtype = at::kDouble;
  options.compatibility = compat;
  return options;
}

// Models as small as these are faster on one thread, and do not disturb tests that run beside.
class OneThread : public ::testing::Environment {
  void SetUp() override { at::set_num_threads(1); }
};
[[maybe_unused]] ::testing::Environment* const kOneThread =
    ::testing::AddGlobalTestEnvironment(new OneThread);

class TrainFamily : public ::testing::TestWithParam<Variant> {};

TEST_P(TrainFamily, float64_forward_equals_the_oracle) {
  for (const char* compat : {"transformers", "remote-code"}) {
    const Config config = config_of(GetParam(), compat);
    TorchModel model = TorchModel::random(config, 3, exact_options(compat));
    disturb(model, 4);
    const TrainBatch batch = random_batch({37, 1, 0, 9}, config.vocab_size, 5);
    const c10::NoGradGuard no_gradients;
    EXPECT_LT(relative_error(model.forward(batch), oracle_logits<double>(model, batch)), 1e-10) << compat;
  }
}

// Kernels in float32 against the composite in double, and the rows that are asked for
TEST_P(TrainFamily, float32_kernels_agree_with_float64) {
  const Config config = config_of(GetParam(), "transformers");
  TorchModel exact = TorchModel::random(config, 3, exact_options());
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  disturb(exact, 4);
  disturb(model, 4);
  TrainBatch batch = random_batch({37, 1, 0, 40}, config.vocab_size, 5);
  batch.wanted = at::tensor(std::vector<int64_t>{0, 36, 37, 77}, at::kLong);
  const c10::NoGradGuard no_gradients;
  const at::Tensor logits = model.forward(batch);
  EXPECT_EQ(logits.sizes(), (std::vector<int64_t>{4, config.vocab_size}));
  EXPECT_EQ(logits.scalar_type(), at::kFloat);
  EXPECT_LT(relative_error(logits, exact.forward(batch)), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Variant, TrainFamily, ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name; });

TEST(TorchModel, float32_forward_equals_the_engine_on_the_bundled_model) {
  Engine engine(load_model(bundled_model()), {1, Dtype::kF32});
  const auto ids = Golden("docs_prompt_300").ids("input_ids");
  const auto expected = run(engine, engine.cache().acquire(), 0, ids);
  TorchModel model = TorchModel::load(bundled_model(), ModelOptions{});
  const c10::NoGradGuard no_gradients;
  const at::Tensor logits = model.forward(batch_of({ids}));
  EXPECT_LT(relative_error(logits, tensor_of(expected, logits.sizes())), 1e-4);
}

TEST(TorchModel, packed_sequences_are_computed_as_if_alone) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, exact_options());
  const std::vector<std::vector<int32_t>> sequences{random_ids(20, config.vocab_size, 1),
                                                    random_ids(1, config.vocab_size, 2),
                                                    random_ids(33, config.vocab_size, 3)};
  const c10::NoGradGuard no_gradients;
  std::vector<at::Tensor> alone;
  for (const auto& ids : sequences) alone.push_back(model.forward(batch_of({ids})));
  EXPECT_LT(relative_error(model.forward(batch_of(sequences)), at::cat(alone)), 1e-13);
}

TEST(TorchModel, batches_that_do_not_fit_are_errors) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  const auto expect_error = [&](auto change, const std::string& text) {
    TrainBatch batch = random_batch({5, 3}, config.vocab_size, 1);
    change(batch);
    try {
      model.forward(batch);
      ADD_FAILURE() << "expected: " << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  expect_error([](TrainBatch& b) { b.cu_seqlens = {0, 5, 7}; }, "cu_seqlens go from 0 to 7, expected 0 to 8");
  expect_error([](TrainBatch& b) { b.cu_seqlens = {0, 9, 8}; }, "rising");
  expect_error([](TrainBatch& b) { b.tokens[2] = 512; }, "token ids: found 512, expected 0 to 511");
  expect_error([](TrainBatch& b) { b.tokens[2] = -1; }, "found -1");
  expect_error([](TrainBatch& b) { b.tokens = b.tokens.to(at::kInt); }, "int64");
  expect_error([](TrainBatch& b) { b.wanted = at::tensor({8}, at::kLong); }, "wanted rows: found 8");
}

TEST(TorchModel, initial_values_are_those_of_the_published_initialisation) {
  const Config config = config_of(variants()[0], "transformers");
  const TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  const TorchModel again = TorchModel::random(config, 3, ModelOptions{});
  const TorchModel other = TorchModel::random(config, 4, ModelOptions{});
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const auto& p = model.parameters()[i];
    EXPECT_TRUE(at::equal(p.tensor, again.parameters()[i].tensor)) << p.name;
    const at::Tensor x = p.tensor.detach().to(at::kDouble);
    const auto within = [&](double low, double high) {
      EXPECT_GE(x.min().item<double>(), low) << p.name;
      EXPECT_LE(x.max().item<double>(), high) << p.name;
    };
    const bool constant =
        p.role == Role::kVector && !p.name.ends_with("A_log") && !p.name.ends_with("dt_bias");
    EXPECT_EQ(at::equal(p.tensor, other.parameters()[i].tensor), constant) << p.name;
    if (p.name.ends_with("A_log")) {
      within(0.0, std::log(16.0));
    } else if (p.name.ends_with("dt_bias")) {
      within(std::log(std::expm1(0.001)) - 1e-5, std::log(std::expm1(0.1)) + 1e-5);
    } else if (p.role == Role::kVector) {
      const double value = p.name.ends_with("correction_bias") ? 0.0 : 1.0;
      within(value, value);
    } else if (p.role == Role::kConv) {
      within(-0.5, 0.5);
      EXPECT_NEAR(x.std().item<double>(), 0.5 / std::sqrt(3.0), 0.03) << p.name;
    } else {
      EXPECT_NEAR(x.std().item<double>(), 0.02, 0.02 * 3 / std::sqrt(static_cast<double>(x.numel())))
          << p.name;
      EXPECT_NEAR(x.mean().item<double>(), 0.0, 0.02 * 4 / std::sqrt(static_cast<double>(x.numel())))
          << p.name;
    }
  }
}

TEST(TorchModel, the_routers_bias_follows_the_sign_of_the_load) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  const TrainBatch batch = random_batch({50}, config.vocab_size, 1);
  {
    const c10::NoGradGuard no_gradients;  // evaluation is not counted
    model.forward(batch);
  }
  model.forward(batch);
  model.forward(batch);
  ASSERT_EQ(model.router_counts().size(), 3U);
  std::vector<at::Tensor> counts;
  for (const auto& layer : model.router_counts()) {
    EXPECT_EQ(layer.counts.sum().item<int64_t>(), 2 * 50 * 2);
    counts.push_back(layer.counts.clone());
  }
  model.update_router_bias(0.25);
  for (size_t i = 0; i < counts.size(); ++i) {
    EXPECT_EQ(model.router_counts()[i].counts.sum().item<int64_t>(), 0);
    const std::string name =
        "model.layers." + std::to_string(i + 1) + ".block_sparse_moe.gate.e_score_correction_bias";
    const at::Tensor bias = parameter(model, name);
    for (int64_t e = 0; e < 8; ++e) {
      const double excess = counts[i][e].item<double>() - 25.0;
      const double expected = excess > 0 ? -0.25 : excess < 0 ? 0.25 : 0.0;
      EXPECT_EQ(bias[e].item<double>(), expected) << name << " " << e;
    }
  }
}

}  // namespace
}  // namespace kilin::testing
