// SPDX-License-Identifier: Apache-2.0
#include "model/gguf_names.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "model/alternatives.h"

namespace kilin {
namespace {

struct Nothing {};

Config docs() {
  return read_config_file(KILIN_SOURCE_DIR "/models/kilin-docs-10m/config.json", "transformers");
}

std::vector<Parameter> parameters(const Config& c) {
  std::vector<Parameter> all;
  ModelWeights<Nothing> weights(c);
  visit_parameters(weights, c, [&](const Parameter& p, Nothing&) { all.push_back(p); });
  return all;
}

TEST(GgufNames, EveryParameterHasOneAndOnlyExpertsShareIt) {
  const Config c = docs();
  std::map<std::string, int> uses;
  for (const Parameter& p : parameters(c)) {
    const std::string name = gguf_name(p);
    ASSERT_NE(name, "") << p.name;
    ++uses[name];
    EXPECT_EQ(expert_number(p).has_value(), p.role == Role::kExpert) << p.name;
  }
  for (const auto& [name, count] : uses)
    EXPECT_EQ(count, name.find("_exps.") == std::string::npos ? 1 : 16) << name;
  // 180 tensors as llama.cpp's converter writes for this model, which splits kv_b_proj of both MLA layers.
  EXPECT_EQ(uses.size(), 178u);
}

TEST(GgufNames, AreThoseOfLlamaCpp) {
  const auto name = [](const char* ours, Role role = Role::kProjection) {
    return gguf_name({ours, {1}, role});
  };
  EXPECT_EQ(name("model.embed_tokens.weight"), "token_embd.weight");
  EXPECT_EQ(name("lm_head.weight"), "output.weight");
  EXPECT_EQ(name("model.layers.12.self_attn.A_log"), "blk.12.ssm_a");
  EXPECT_EQ(name("model.layers.0.self_attn.dt_bias"), "blk.0.ssm_dt.bias");
  EXPECT_EQ(name("model.layers.3.self_attn.q_proj.weight"), "blk.3.attn_q.weight");
  EXPECT_EQ(name("model.layers.3.block_sparse_moe.experts.255.w2.weight", Role::kExpert),
            "blk.3.ffn_down_exps.weight");
  EXPECT_EQ(name("model.layers.3.block_sparse_moe.gate.e_score_correction_bias"), "blk.3.exp_probs_b.bias");
  for (const char* strange : {"", "model.layers.", "model.layers.x.input_layernorm.weight", "model.layers.3",
                              "model.layers.3.", "model.layers.99999999999999999999.input_layernorm.weight",
                              "model.layers.3.w1.weigh", "visual.weight"}) {
    EXPECT_EQ(name(strange), "") << strange;
  }
}

const TensorSource* source_of(const std::vector<TensorSource>& sources, const std::string& name) {
  const auto at = std::find_if(sources.begin(), sources.end(), [&](const auto& s) { return s.name == name; });
  return at == sources.end() ? nullptr : &*at;
}

std::vector<TensorSource> sources_of(const std::string& name, const Config& c) {
  for (const Parameter& p : parameters(c)) {
    if (p.name == name) return tensor_sources(p, c);
  }
  return {};
}

TEST(GgufNames, ExpertsLieStackedInOneTensor) {
  const Config c = docs();
  const auto up = sources_of("model.layers.1.block_sparse_moe.experts.3.w3.weight", c);
  const TensorSource* s = source_of(up, "blk.1.ffn_up_exps.weight");
  ASSERT_NE(s, nullptr);
  EXPECT_EQ(s->shape, (Shape{16, 64, 256}));
  EXPECT_EQ(s->offset, 3 * 64 * 256);
  EXPECT_EQ(s->transform, Transform::kNone);
  const auto down = sources_of("model.layers.7.block_sparse_moe.experts.15.w2.weight", c);
  s = source_of(down, "blk.7.ffn_down_exps.weight");
  ASSERT_NE(s, nullptr);
  EXPECT_EQ(s->shape, (Shape{16, 256, 64}));
  EXPECT_EQ(s->offset, 15 * 64 * 256);
}

TEST(GgufNames, TransformedTensors) {
  const Config c = docs();
  const auto a = sources_of("model.layers.0.self_attn.A_log", c);
  const TensorSource* s = source_of(a, "blk.0.ssm_a");
  ASSERT_NE(s, nullptr);
  EXPECT_EQ(s->transform, Transform::kLogOfNegative);
  EXPECT_TRUE(same_shape({1, 1, 4, 1}, s->shape, Role::kVector));
  EXPECT_TRUE(same_shape({4, 1}, s->shape, Role::kVector));

  const auto kv = sources_of("model.layers.3.self_attn.kv_b_proj.weight", c);
  s = source_of(kv, "blk.3.attn_k_b.weight");
  ASSERT_NE(s, nullptr);
  EXPECT_EQ(s->transform, Transform::kJoinHeads);
  EXPECT_EQ(s->shape, (Shape{4, 64, 32}));
  EXPECT_EQ(s->second_name, "blk.3.attn_v_b.weight");
  EXPECT_EQ(s->second_shape, (Shape{4, 32, 64}));
  const TensorSource* whole = source_of(kv, "blk.3.attn_kv_b.weight");
  ASSERT_NE(whole, nullptr);
  EXPECT_EQ(whole->transform, Transform::kNone);
  EXPECT_EQ(whole->shape, (Shape{256, 64}));
}

TEST(GgufNames, ConvolutionsOfThreeAndFourDimensions) {
  const Config c = docs();
  const auto sources = sources_of("model.layers.0.self_attn.k_conv1d.weight", c);
  const TensorSource* s = source_of(sources, "blk.0.ssm_conv1d_k.weight");
  ASSERT_NE(s, nullptr);
  EXPECT_TRUE(same_shape({1, 256, 1, 4}, s->shape, Role::kConv));
  EXPECT_TRUE(same_shape({256, 1, 4}, s->shape, Role::kConv));
  EXPECT_FALSE(same_shape({4, 256}, s->shape, Role::kConv));
}

TEST(GgufNames, OurOwnNamesComeFirst) {
  const Config c = docs();
  for (const Parameter& p : parameters(c)) {
    const auto sources = tensor_sources(p, c);
    EXPECT_EQ(sources.front().name, p.name);
    std::set<std::string> names;
    for (const TensorSource& s : sources) EXPECT_TRUE(names.insert(s.name).second) << s.name;
  }
}

}  // namespace
}  // namespace kilin
