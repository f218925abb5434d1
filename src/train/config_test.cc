// SPDX-License-Identifier: Apache-2.0
#include "train/config.h"

#include <gtest/gtest.h>

#include "io/test_support.h"
#include "train/cost.h"
#include "train/model_section.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::TemporaryDirectory;

// Line 1 is "[run]".
constexpr const char* kGood = R"([run]
out = "runs/test"
steps = 100
[model]
vocab_size = 64
hidden_size = 32
num_hidden_layers = 4
layers = "3:1"
intermediate_size = 64
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
[model.linear_attn_config]
num_heads = 2
head_dim = 16
short_conv_kernel_size = 4
[data]
kind = "synthetic"
task = "palindrome"
vocabulary = 64
sequence = 32
[batch]
sequences = 8
[optimizer]
lr = 1e-3
)";

TrainConfig read(const std::string& text, const std::vector<std::string>& overrides = {}) {
  TomlTable table = parse_toml(text, "t.toml");
  for (const std::string& assignment : overrides) set_toml(table, assignment);
  return read_train_config(table, "t.toml");
}

std::string error(const std::vector<std::string>& overrides) {
  return error_of([&] { read(kGood, overrides); });
}

// kGood with one line replaced, to see the line number in the message.
std::string error_with(const std::string& line, const std::string& replacement) {
  std::string text = kGood;
  text.replace(text.find(line), line.size(), replacement);
  return error_of([&] { read(text); });
}

TEST(TrainConfig, ReadsShapeAndDefaults) {
  const TrainConfig config = read(kGood);
  EXPECT_EQ(config.model.shape.count(LayerKind::kKda), 3);
  EXPECT_EQ(config.model.shape.layers[3], LayerKind::kMla);
  EXPECT_EQ(config.tokens_per_step(), 8 * 32);
  EXPECT_EQ(config.schedule.kind, ScheduleKind::kWsd);
  EXPECT_EQ(config.schedule.warmup, 10);
  EXPECT_EQ(config.schedule.decay, 18);
  EXPECT_EQ(config.optimizer.clip, 1.0);
  EXPECT_FALSE(config.lora);
  EXPECT_EQ(config.data.synthetic.length, 32);
}

TEST(TrainConfig, LayersByRatioListAndKind) {
  EXPECT_EQ(read(kGood, {"model.layers=0:1"}).model.shape.count(LayerKind::kMla), 4);
  EXPECT_EQ(read(kGood, {"model.layers=1:1"}).model.shape.layers[1], LayerKind::kMla);
  EXPECT_EQ(read(kGood, {"model.layers=1:0", "model.linear=gdn"}).model.shape.count(LayerKind::kGdn), 4);
  const Config mixed = read(kGood, {"model.layers=[\"gdn\", \"mla\"]"}).model.shape;
  EXPECT_EQ(mixed.layers[2], LayerKind::kGdn);
  EXPECT_EQ(mixed.count(LayerKind::kMla), 2);
}

TEST(TrainConfig, TokensInsteadOfStepsAndSequences) {
  const TrainConfig config = read(kGood, {"batch.sequences=4", "batch.accumulate=2"});
  EXPECT_EQ(config.batch.accumulate, 2);
  std::string text = kGood;
  text.replace(text.find("steps = 100"), 11, "tokens = 10_000");
  text.replace(text.find("sequences = 8"), 13, "tokens = 1024");
  EXPECT_EQ(read(text).run.steps, 10);
  EXPECT_EQ(read(text).batch.sequences, 32);
}

TEST(TrainConfig, FaultsNameLineAndKey) {
  EXPECT_EQ(error_with("lr = 1e-3", "lr = 1e-3\nrl = 2"),
            "t.toml:28: key 'optimizer.rl' is unknown (known in [optimizer]: beta1, beta2, clip, decay, "
            "epsilon, kind, lr, weight_decay)");
  EXPECT_EQ(error_with("lr = 1e-3", "lr = \"fast\""),
            "t.toml:27: key 'optimizer.lr': found \"fast\", expected a number from 0 to 10");
  EXPECT_EQ(error_with("hidden_size = 32", "hidden_size = \"big\""),
            "t.toml:6: key 'model.hidden_size': found \"big\", expected an integer from 1 to 16777216");
  EXPECT_EQ(
      error_with("head_dim = 16\nshort", "head_dim = 1000\nshort"),
      "t.toml:17: key 'model.linear_attn_config.head_dim': found 1000, expected an integer from 1 to 256");
  EXPECT_EQ(error_with("layers = \"3:1\"", "layers = \"three\""),
            "t.toml:8: key 'model.layers': found \"three\", expected the names kda, gdn and mla in the list");
  EXPECT_EQ(
      error_with("layers = \"3:1\"", "layers = \"0:0\""),
      "t.toml:8: key 'model.layers': found \"0:0\", expected a ratio of linear to full attention layers, for "
      "example \"3:1\"");
  EXPECT_EQ(error_with("task = \"palindrome\"", "task = \"sorting\""),
            "t.toml:21: key 'data.task': found \"sorting\", expected \"palindrome\", \"mqar\" or \"stack\"");
  EXPECT_EQ(error_with("vocabulary = 64", "vocabulary = 65"),
            "t.toml:22: key 'data.vocabulary': found 65, but the model has a vocabulary of 64");
  EXPECT_EQ(error_with("steps = 100", ""),
            "t.toml: key 'run.steps' is missing, expected a whole number from 1 to "
            "1099511627776");
}

TEST(TrainConfig, ValuesThatDoNotFitEachOther) {
  EXPECT_EQ(
      error({"batch.accumulate=3"}),
      "--set batch.accumulate: key 'batch.accumulate': found 3, expected a divisor of the 8 sequences of a "
      "step");
  EXPECT_EQ(
      error({"schedule.warmup=200"}),
      "--set schedule.warmup: key 'schedule.warmup': found 200, expected at most the 100 steps of the run");
  EXPECT_EQ(error({"run.tokens=5"}),
            "--set run.tokens: key 'run.tokens': found 5, expected either 'tokens' or 'steps', not both");
  EXPECT_NE(error({"model.intermediate_size=0"}).find("intermediate_size"), std::string::npos);
  EXPECT_NE(error({"model.hiden_size=3"}).find("--set model.hiden_size: key 'model.hiden_size' is unknown"),
            std::string::npos);
  EXPECT_NE(error({"lora.rank=4"}).find("key 'lora.targets' is missing"), std::string::npos);
  EXPECT_NE(error({"lora.targets=q_proj"}).find("key 'model.checkpoint' is missing"), std::string::npos);
  EXPECT_NE(error({"data.sequence=33"}).find("section [data]"), std::string::npos);  // palindromes are even
}

TEST(TrainConfig, FilesMustExist) {
  const TemporaryDirectory directory;
  const std::string file = directory.write("a.kbin", "");
  EXPECT_EQ(error({"data.kind=tokens", "data.train=/nowhere.kbin"}),
            "--set data.train: key 'data.train': file '/nowhere.kbin' does not exist");
  EXPECT_EQ(error({"data.kind=tokens", "data.train=" + directory.path()}),
            "--set data.train: key 'data.train': '" + directory.path() + "' is a directory, expected a file");
  // Keys of another kind of data are unknown ones.
  EXPECT_EQ(error({"data.kind=tokens", "data.train=" + file}),
            "t.toml:21: key 'data.task' is unknown (known in [data]: kind, packing, sequence, train, valid, "
            "valid_sequences)");
}

TEST(TrainConfig, SeveralSyntheticExamplesARow) {
  const auto error = [](const std::string& value) { return error_of([&] { read(kGood, {value}); }); };
  EXPECT_EQ(read(kGood, {"data.examples_per_row=[4, 1]"}).data.examples_per_row,
            (std::vector<int64_t>{4, 1}));
  EXPECT_EQ(
      error("data.examples_per_row=4"),
      "--set data.examples_per_row: key 'data.examples_per_row': found 4, expected a list of integers from 1 "
      "to 16777216");
  EXPECT_EQ(error("data.examples_per_row=[4, 0]").find("--set data.examples_per_row: key"), 0u);
  EXPECT_EQ(
      error("data.examples_per_row=[4, 5]"),
      "t.toml:21: section [data]: examples_per_row: found 5, expected a divisor of the 32 tokens of a row");
}

TEST(TrainConfig, CheckpointsAndConfigFiles) {
  const std::string docs = std::string(KILIN_SOURCE_DIR) + "/models/kilin-docs-10m";
  const std::string text = "[run]\nout = \"x\"\nsteps = 1\n[model]\ncheckpoint = \"" + docs +
                           "\"\n[data]\nkind = \"synthetic\"\ntask = \"mqar\"\nsequence = 64\n[batch]\n"
                           "sequences = 1\n[optimizer]\nlr = 1e-3\n";
  const TrainConfig config = read(text);
  EXPECT_EQ(config.model.from, ModelFrom::kCheckpoint);
  EXPECT_EQ(config.model.tokenizer, docs);
  EXPECT_EQ(config.model.shape.layer_count(), 8);
  const TrainingCost cost = training_cost(config);
  EXPECT_EQ(cost.parameters, 12896536 + 7 * 16);  // tests/data/reference/README.md, and the router biases
  EXPECT_EQ(error_of([&] { read(text, {"model.checkpoint=/nowhere"}); }),
            "--set model.checkpoint: key 'model.checkpoint': file '/nowhere/config.json' does not exist");
  EXPECT_NE(error_of([&] { read(text, {"model.hidden_size=3"}); }).find("key 'model.hidden_size' is unknown"),
            std::string::npos);
  const TrainConfig fine_tune = read(text, {"lora.targets=[\"q_proj\"]", "lora.rank=4"});
  EXPECT_EQ(fine_tune.lora->alpha, 8);
  EXPECT_LT(training_cost(fine_tune).bytes_gradients, cost.bytes_gradients / 10);
}

TEST(TrainConfig, ShapesAreComparedByKey) {
  const Config shape = read(kGood).model.shape;
  EXPECT_EQ(shape_difference(shape, shape), "");
  EXPECT_EQ(shape_difference(read(kGood, {"model.hidden_size=48"}).model.shape, shape),
            "key 'hidden_size': found 48, expected 32");
  EXPECT_NE(shape_difference(read(kGood, {"model.layers=1:1"}).model.shape, shape), "");
}

TEST(TrainConfig, DifferencesLeaveOutWhatDoesNotMatter) {
  const TrainConfig first = read(kGood);
  const TrainConfig second = read(kGood, {"run.out=elsewhere", "optimizer.lr=0.002", "run.keep=9"});
  EXPECT_EQ(differences(first.flat, second.flat),
            (std::vector<std::string>{"key 'optimizer.lr': 0.001, now 0.002"}));
  EXPECT_EQ(differences(second.flat, first.flat).size(), 1u);
}

}  // namespace
}  // namespace kilin::train
