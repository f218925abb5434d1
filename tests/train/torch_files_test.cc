// SPDX-License-Identifier: Apache-2.0
// Files of the training room, and LoRA.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support/variants.h"
#include "train/torch_test_support.h"

namespace kilin::testing {
namespace {

namespace fs = std::filesystem;
using train::ModelOptions;
using train::TorchModel;

class TrainFiles : public ::testing::Test {
 protected:
  TrainFiles() : directory_(fs::temp_directory_path() / ("kilin-train-" + std::to_string(::getpid()))) {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  ~TrainFiles() override { fs::remove_all(directory_); }
  std::string path(const std::string& name) const { return (directory_ / name).string(); }
  std::vector<std::string> entries(const std::string& name) const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(directory_ / name))
      found.push_back(entry.path().filename().string());
    std::sort(found.begin(), found.end());
    return found;
  }

  fs::path directory_;
};

class TrainFilesOf : public TrainFiles, public ::testing::WithParamInterface<Variant> {};

TEST_P(TrainFilesOf, a_saved_model_has_the_same_bits_and_the_engine_reads_it) {
  const Config config = config_of(GetParam(), "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  disturb(model, 4);
  model.save(path("model"), at::kFloat);
  EXPECT_EQ(entries("model"),
            (std::vector<std::string>{"config.json", "generation_config.json", "model.safetensors"}));
  EXPECT_EQ(entries(".").size(), 1U);
  TorchModel again = TorchModel::load(path("model"), ModelOptions{});
  EXPECT_EQ(again.config(), config);
  for (size_t i = 0; i < model.parameters().size(); ++i)
    EXPECT_TRUE(at::equal(model.parameters()[i].tensor, again.parameters()[i].tensor))
        << model.parameters()[i].name;

  Engine engine(load_model(path("model")), {1, Dtype::kF32});
  const auto ids = random_ids(50, config.vocab_size, 7);
  const auto expected = run(engine, engine.cache().acquire(), 0, ids);
  const c10::NoGradGuard no_gradients;
  const at::Tensor logits = model.forward(batch_of({ids}));
  EXPECT_LT(relative_error(logits, tensor_of(expected, logits.sizes())), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Variant, TrainFilesOf, ::testing::ValuesIn(variants()),
                         [](const auto& test) { return test.param.name; });

TEST_F(TrainFiles, bfloat16_keeps_gate_parameters_in_float32_and_takes_the_place_of_an_older_model) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  model.save(path("model"), at::kFloat);
  std::ofstream(path("extra.txt")) << "kept";
  std::ofstream(path("model/notes.txt")) << "mine";
  model.save(path("model"), at::kBFloat16, {path("extra.txt")});
  EXPECT_EQ(entries("model"), (std::vector<std::string>{"config.json", "extra.txt", "generation_config.json",
                                                        "model.safetensors", "notes.txt"}));
  const TorchModel again = TorchModel::load(path("model"), ModelOptions{});
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const auto& p = model.parameters()[i];
    const bool exact = p.name.ends_with("A_log") || p.name.ends_with("dt_bias");
    const at::Tensor expected = exact ? p.tensor : p.tensor.to(at::kBFloat16).to(at::kFloat);
    EXPECT_TRUE(at::equal(again.parameters()[i].tensor, expected)) << p.name;
  }
  std::ofstream(path("file")) << "x";
  EXPECT_THROW(model.save(path("file"), at::kFloat), Error);
  EXPECT_THROW(model.save(path("none/model"), at::kFloat), Error);
  EXPECT_THROW(model.save(path("."), at::kFloat), Error);  // not empty, and no model
  EXPECT_THROW(model.save(path("double"), at::kDouble), Error);
  EXPECT_FALSE(fs::exists(path("double")));
  EXPECT_EQ(entries("."), (std::vector<std::string>{"extra.txt", "file", "model"}));
}

TEST_F(TrainFiles, the_bundled_model_comes_back_with_the_same_bits) {
  const TorchModel model = TorchModel::load(bundled_model(), ModelOptions{});
  model.save(path("model"), at::kBFloat16);
  const TorchModel again = TorchModel::load(path("model"), ModelOptions{});
  for (size_t i = 0; i < model.parameters().size(); ++i)
    EXPECT_TRUE(at::equal(model.parameters()[i].tensor, again.parameters()[i].tensor))
        << model.parameters()[i].name;
}

const train::LoraOptions kEverywhere{{"all-linear", "lm_head"}, 3, 6.0, 5};

TorchModel with_lora(const Config& config, const train::LoraOptions& lora) {
  ModelOptions options;
  options.dtype = at::kDouble;
  TorchModel model = TorchModel::random(config, 3, options);
  model.add_lora(lora);
  return model;
}

void fill_b(const TorchModel& model) {
  Random random(9);
  for (const auto& p : model.lora_parameters()) {
    if (!p.name.ends_with("lora_B.weight")) continue;
    at::Tensor x = p.tensor.detach();
    for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = 0.1 * random.normal();
  }
}

TEST_F(TrainFiles, lora_changes_nothing_at_first_and_merged_what_it_did_applied) {
  for (const size_t variant : {0, 1, 7, 19}) {
    const Config config = config_of(variants()[variant], "transformers");
    TorchModel model =
        with_lora(config, config.tied_head ? train::LoraOptions{{"all-linear"}, 3, 6.0, 5} : kEverywhere);
    TorchModel plain = TorchModel::random(config, 3, model.options());
    const auto batch = random_batch({20, 7}, config.vocab_size, 1);
    const c10::NoGradGuard no_gradients;
    const at::Tensor before = plain.forward(batch);
    EXPECT_LT(relative_error(model.forward(batch), before), 1e-14);
    fill_b(model);
    const at::Tensor applied = model.forward(batch);
    EXPECT_GT(relative_error(applied, before), 0.01);
    model.merge_lora();
    EXPECT_FALSE(model.has_lora());
    EXPECT_LT(relative_error(model.forward(batch), applied), 1e-12);
    EXPECT_TRUE(model.parameters()[0].tensor.requires_grad());
  }
}

TEST_F(TrainFiles, lora_freezes_the_model_and_names_its_matrices_as_peft_does) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  model.add_lora({{"f_b_proj", "experts.1.w2", "model.layers.3.*_proj"}, 4, 8.0, 1});
  for (const auto& p : model.parameters()) EXPECT_FALSE(p.tensor.requires_grad()) << p.name;
  std::vector<std::string> names;
  for (const auto& p : model.lora_parameters()) {
    EXPECT_TRUE(p.tensor.requires_grad());
    if (p.name.ends_with("lora_A.weight")) names.push_back(p.name.substr(0, p.name.size() - 14));
  }
  const std::string start = "base_model.model.model.layers.";
  EXPECT_EQ(names, (std::vector<std::string>{
                       start + "0.self_attn.f_b_proj", start + "1.self_attn.f_b_proj",
                       start + "1.block_sparse_moe.experts.1.w2", start + "2.self_attn.f_b_proj",
                       start + "2.block_sparse_moe.experts.1.w2", start + "3.self_attn.q_proj",
                       start + "3.self_attn.kv_b_proj", start + "3.self_attn.o_proj",
                       start + "3.block_sparse_moe.experts.1.w2",
                       start + "3.block_sparse_moe.shared_experts.gate_proj",
                       start + "3.block_sparse_moe.shared_experts.up_proj",
                       start + "3.block_sparse_moe.shared_experts.down_proj"}));
  EXPECT_EQ(model.lora_parameters()[0].shape, (Shape{4, 32}));
  EXPECT_EQ(model.lora_parameters()[1].shape, (Shape{64, 4}));
  EXPECT_THROW(model.add_lora(kEverywhere), Error);
  EXPECT_THROW(model.save(path("model"), at::kFloat), Error);
  TorchModel other = TorchModel::random(config, 3, ModelOptions{});
  EXPECT_THROW(other.add_lora({{"no_proj"}, 4, 8.0, 1}), Error);
  EXPECT_THROW(other.add_lora({{"embed_tokens"}, 4, 8.0, 1}), Error);
  EXPECT_THROW(other.merge_lora(), Error);
  EXPECT_FALSE(other.has_lora());
}

TEST_F(TrainFiles, an_adapter_comes_back) {
  const Config config = config_of(variants()[0], "transformers");
  TorchModel model = TorchModel::random(config, 3, ModelOptions{});
  model.add_lora(kEverywhere);
  for (const auto& p : model.lora_parameters()) p.tensor.detach().add_(0.01);
  model.save_lora(path("adapter"), "some/model");
  model.save_lora(path("adapter"), "models/base");  // in the place of the other
  EXPECT_EQ(entries("adapter"),
            (std::vector<std::string>{"adapter_config.json", "adapter_model.safetensors"}));
  const auto json = io::parse_json_file(path("adapter/adapter_config.json"));
  EXPECT_EQ(json["base_model_name_or_path"], "models/base");
  EXPECT_EQ(json["r"], 3);
  EXPECT_EQ(json["lora_alpha"], 6.0);
  TorchModel again = TorchModel::random(config, 3, ModelOptions{});
  again.load_lora(path("adapter"));
  ASSERT_EQ(again.lora_parameters().size(), model.lora_parameters().size());
  const auto batch = random_batch({20, 7}, config.vocab_size, 1);
  const c10::NoGradGuard no_gradients;
  EXPECT_TRUE(at::equal(again.forward(batch), model.forward(batch)));
  // of another shape
  TorchModel other = TorchModel::random(config_of(variants()[11], "transformers"), 3, ModelOptions{});
  EXPECT_THROW(other.load_lora(path("adapter")), Error);
  EXPECT_FALSE(other.has_lora());
  EXPECT_THROW(other.load_lora(path("nothing")), Error);
}

}  // namespace
}  // namespace kilin::testing
