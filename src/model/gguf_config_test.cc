// SPDX-License-Identifier: Apache-2.0
#include "model/gguf_config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <variant>

#include "base/error.h"

namespace kilin {
namespace {

using Value =
    std::variant<uint32_t, float, bool, std::string, std::vector<int32_t>, std::vector<std::string>>;
using Metadata = std::map<std::string, Value>;

// What llama.cpp's converter writes for models/kilin-docs-10m.
Metadata docs_keys() {
  return {{"general.architecture", "kimi-linear"},
          {"general.file_type", 32u},
          {"kimi-linear.block_count", 8u},
          {"kimi-linear.context_length", 1048576u},
          {"kimi-linear.embedding_length", 256u},
          {"kimi-linear.feed_forward_length", 768u},
          {"kimi-linear.attention.head_count", 4u},
          {"kimi-linear.attention.head_count_kv", std::vector<int32_t>{0, 0, 0, 1, 0, 0, 0, 1}},
          {"kimi-linear.rope.freq_base", 10000.0f},
          {"kimi-linear.attention.layer_norm_rms_epsilon", 1e-5f},
          {"kimi-linear.expert_count", 16u},
          {"kimi-linear.expert_used_count", 2u},
          {"kimi-linear.expert_group_used_count", 1u},
          {"kimi-linear.expert_gating_func", 2u},
          {"kimi-linear.attention.key_length", 80u},
          {"kimi-linear.attention.value_length", 16u},
          {"kimi-linear.vocab_size", 8192u},
          {"kimi-linear.ssm.conv_kernel", 4u},
          {"kimi-linear.kda.head_dim", 64u},
          {"kimi-linear.attention.kv_lora_rank", 64u},
          {"kimi-linear.rope.dimension_count", 16u},
          {"kimi-linear.attention.key_length_mla", 48u},
          {"kimi-linear.attention.value_length_mla", 32u},
          {"kimi-linear.expert_feed_forward_length", 64u},
          {"kimi-linear.expert_shared_count", 1u},
          {"kimi-linear.leading_dense_block_count", 1u},
          {"kimi-linear.expert_weights_scale", 2.446f},
          {"tokenizer.ggml.bos_token_id", 7936u},
          {"tokenizer.ggml.eos_token_id", 7937u}};
}

class Written {
 public:
  explicit Written(const std::function<void(io::GgufWriter&)>& write)
      : path_(std::filesystem::temp_directory_path() /
              ("kilin-gguf-config-" + std::to_string(getpid()) + ".gguf")) {
    io::GgufWriter writer(path_.string());
    write(writer);
    writer.commit();
  }
  explicit Written(const Metadata& metadata)
      : Written([&](io::GgufWriter& w) {
          for (const auto& [key, value] : metadata) add(w, key, value);
        }) {}
  ~Written() { std::filesystem::remove(path_); }
  Written(const Written&) = delete;
  Written& operator=(const Written&) = delete;

  io::GgufFile open() const { return io::GgufFile::open(path_.string()); }
  Config read(const char* compat = "transformers") const {
    return read_gguf_config(open(), compatibility(compat));
  }
  std::string error() const {
    try {
      read();
    } catch (const Error& e) {
      std::string what = e.what();
      EXPECT_TRUE(what.starts_with(path_.string())) << what;
      return what;
    }
    return "";
  }

 private:
  static void add(io::GgufWriter& w, const std::string& key, const Value& value) {
    struct Add {
      io::GgufWriter& w;
      const std::string& key;
      void operator()(uint32_t v) const { w.add_uint32(key, v); }
      void operator()(float v) const { w.add_float32(key, v); }
      void operator()(bool v) const { w.add_bool(key, v); }
      void operator()(const std::string& v) const { w.add_string(key, v); }
      void operator()(const std::vector<int32_t>& v) const { w.add_int32s(key, v); }
      void operator()(const std::vector<std::string>& v) const { w.add_strings(key, v); }
    };
    std::visit(Add{w, key}, value);
  }

  std::filesystem::path path_;
};

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void expect_same(const Config& a, const Config& b) {
  EXPECT_EQ(a.vocab_size, b.vocab_size);
  EXPECT_EQ(a.hidden, b.hidden);
  EXPECT_EQ(a.dense_width, b.dense_width);
  EXPECT_EQ(a.norm_eps, b.norm_eps);
  EXPECT_EQ(a.tied_head, b.tied_head);
  EXPECT_EQ(a.max_length, b.max_length);
  EXPECT_EQ(a.layers, b.layers);
  EXPECT_EQ(a.sparse, b.sparse);
  EXPECT_EQ(a.bos_id, b.bos_id);
  EXPECT_EQ(a.eos_ids, b.eos_ids);
  EXPECT_EQ(a.linear.heads, b.linear.heads);
  EXPECT_EQ(a.linear.value_heads, b.linear.value_heads);
  EXPECT_EQ(a.linear.key_dim, b.linear.key_dim);
  EXPECT_EQ(a.linear.value_dim, b.linear.value_dim);
  EXPECT_EQ(a.linear.conv_taps, b.linear.conv_taps);
  EXPECT_EQ(a.linear.gate_lower_bound, b.linear.gate_lower_bound);
  EXPECT_EQ(a.linear.output_gate, b.linear.output_gate);
  EXPECT_EQ(a.mla.heads, b.mla.heads);
  EXPECT_EQ(a.mla.nope, b.mla.nope);
  EXPECT_EQ(a.mla.rope, b.mla.rope);
  EXPECT_EQ(a.mla.value, b.mla.value);
  EXPECT_EQ(a.mla.latent, b.mla.latent);
  EXPECT_EQ(a.mla.use_rope, b.mla.use_rope);
  EXPECT_EQ(a.mla.latent_norm_eps, b.mla.latent_norm_eps);
  EXPECT_EQ(a.moe.experts, b.moe.experts);
  EXPECT_EQ(a.moe.top_k, b.moe.top_k);
  EXPECT_EQ(a.moe.shared, b.moe.shared);
  EXPECT_EQ(a.moe.width, b.moe.width);
  EXPECT_EQ(a.moe.groups, b.moe.groups);
  EXPECT_EQ(a.moe.groups_kept, b.moe.groups_kept);
  EXPECT_EQ(a.moe.renormalize, b.moe.renormalize);
  EXPECT_EQ(a.moe.sigmoid_router, b.moe.sigmoid_router);
  EXPECT_EQ(a.moe.scale, b.moe.scale);
}

const std::string kDocs = KILIN_SOURCE_DIR "/models/kilin-docs-10m/config.json";

TEST(GgufConfig, KeysOfLlamaCppSayWhatConfigJsonSays) {
  expect_same(Written(docs_keys()).read(), read_config_file(kDocs, "transformers"));
}

TEST(GgufConfig, CompatibilityHoldsAsForConfigJson) {
  const Written file(docs_keys());
  EXPECT_EQ(file.read().mla.latent_norm_eps, 1e-6);
  EXPECT_EQ(file.read("vllm").mla.latent_norm_eps, 1e-5);
  EXPECT_TRUE(file.read("remote-code").moe.biased_weights);
}

TEST(GgufConfig, MissingKeys) {
  for (const char* name : {"general.architecture", "kimi-linear.block_count", "kimi-linear.embedding_length",
                           "kimi-linear.attention.head_count", "kimi-linear.attention.head_count_kv",
                           "kimi-linear.attention.layer_norm_rms_epsilon", "kimi-linear.ssm.conv_kernel",
                           "kimi-linear.kda.head_dim", "kimi-linear.attention.kv_lora_rank",
                           "kimi-linear.rope.dimension_count", "kimi-linear.attention.key_length_mla",
                           "kimi-linear.attention.value_length_mla", "kimi-linear.expert_used_count",
                           "kimi-linear.expert_gating_func", "kimi-linear.expert_feed_forward_length",
                           "kimi-linear.expert_shared_count", "kimi-linear.vocab_size"}) {
    Metadata metadata = docs_keys();
    metadata.erase(name);
    EXPECT_NE(Written(metadata).error().find(name), std::string::npos) << name;
  }
}

TEST(GgufConfig, ImpossibleValues) {
  const std::vector<std::pair<std::string, Value>> cases = {
      {"general.architecture", "llama"},
      {"general.architecture", 3u},
      {"kimi-linear.block_count", 0u},
      {"kimi-linear.block_count", 5000u},
      {"kimi-linear.block_count", "8"},
      {"kimi-linear.embedding_length", 4000000000u},
      {"kimi-linear.attention.head_count", 0u},
      {"kimi-linear.attention.head_count_kv", std::vector<int32_t>{0, 1}},
      {"kimi-linear.attention.head_count_kv", std::vector<int32_t>{0, 0, 0, 1, 0, 0, 0, -1}},
      {"kimi-linear.attention.head_count_kv", 1u},
      {"kimi-linear.attention.key_length_mla", 16u},
      {"kimi-linear.kda.head_dim", 257u},
      {"kimi-linear.ssm.conv_kernel", 9u},
      {"kimi-linear.expert_used_count", 17u},
      {"kimi-linear.expert_gating_func", 3u},
      {"kimi-linear.leading_dense_block_count", 9u},
      {"kimi-linear.vocab_size", 0u},
      {"tokenizer.ggml.eos_token_id", 8192u},
      {"kimi-linear.attention.q_lora_rank", 1536u},
      {"kimi-linear.attention.sliding_window", 128u},
  };
  for (const auto& [key, value] : cases) {
    Metadata metadata = docs_keys();
    metadata[key] = value;
    EXPECT_NE(Written(metadata).error().find(key), std::string::npos)
        << key << ": " << Written(metadata).error();
  }
}

TEST(GgufConfig, VocabularyFromTheTokens) {
  Metadata metadata = docs_keys();
  metadata.erase("kimi-linear.vocab_size");
  metadata.erase("tokenizer.ggml.bos_token_id");
  metadata["tokenizer.ggml.eos_token_id"] = 1u;
  metadata["tokenizer.ggml.tokens"] = std::vector<std::string>{"a", "b", "c"};
  EXPECT_EQ(Written(metadata).read().vocab_size, 3);
}

TEST(GgufConfig, WithoutExpertsEverythingIsDense) {
  Metadata metadata = docs_keys();
  metadata["kimi-linear.expert_count"] = 0u;
  const Config c = Written(metadata).read();
  EXPECT_EQ(std::count(c.sparse.begin(), c.sparse.end(), true), 0);
}

// Every variant that Kilin computes survives, through Kilin's own key.
nlohmann::json variant() {
  nlohmann::json json = nlohmann::json::parse(text_of(kDocs));
  nlohmann::json& linear = json["linear_attn_config"];
  linear["kda_layers"] = {1, 2, 3};
  linear["full_attn_layers"] = {4, 8};
  linear["gdn_layers"] = {5, 6, 7};
  linear["num_value_heads"] = 8;
  linear["value_head_dim"] = 32;
  linear["short_conv_kernel_size"] = 1;
  linear["output_gate"] = "silu";
  json["tie_word_embeddings"] = true;
  json["mla_use_nope"] = false;
  json["moe_layer_freq"] = 2;
  json["moe_renormalize"] = false;
  json["num_expert_group"] = 4;
  json["topk_group"] = 2;
  json["moe_router_activation_func"] = "softmax";
  json["num_shared_experts"] = 0;
  return json;
}

TEST(GgufConfig, VariantsSurvive) {
  const std::string text = variant().dump();
  const Config c = read_config(io::JsonReader(variant(), "config.json"), compatibility("transformers"));
  const Written file([&](io::GgufWriter& w) { write_gguf_config(c, text, w); });
  expect_same(file.read(), c);
  EXPECT_EQ(gguf_config_text(file.open()), text);
  EXPECT_EQ(beyond_llama_cpp(c).size(), 10u);
  EXPECT_EQ(beyond_llama_cpp(read_config_file(kDocs, "transformers")).size(), 0u);
}

TEST(GgufConfig, BothDescriptionsMustAgree) {
  Metadata metadata = docs_keys();
  metadata["kilin.config"] = text_of(kDocs);
  expect_same(Written(metadata).read(), read_config_file(kDocs, "transformers"));
  const std::vector<std::pair<std::string, Value>> cases = {
      {"kimi-linear.block_count", 7u},
      {"kimi-linear.embedding_length", 128u},
      {"kimi-linear.vocab_size", 100u},
      {"kimi-linear.expert_count", 8u},
      {"kimi-linear.attention.head_count_kv", std::vector<int32_t>{0, 0, 0, 1, 0, 0, 1, 0}},
      {"kimi-linear.unknown", 1u},
  };
  for (const auto& [key, value] : cases) {
    Metadata changed = metadata;
    changed[key] = value;
    EXPECT_NE(Written(changed).error().find(key), std::string::npos)
        << key << ": " << Written(changed).error();
  }
  metadata["kilin.config"] = "{";
  EXPECT_NE(Written(metadata).error().find("kilin.config"), std::string::npos);
  metadata["kilin.config"] = "{}";
  EXPECT_NE(Written(metadata).error().find("kilin.config"), std::string::npos);
}

TEST(GgufConfig, WritesTheKeysOfLlamaCppsConverter) {
  const Config c = read_config_file(kDocs, "transformers");
  const Written ours([&](io::GgufWriter& w) { write_gguf_config(c, text_of(kDocs), w); });
  const Written theirs(docs_keys());
  const io::GgufFile a = ours.open();
  const io::GgufFile b = theirs.open();
  for (const auto& [key, value] : b.metadata()) {
    if (!key.starts_with("kimi-linear.") || key.ends_with(".value_length")) continue;  // theirs is junk
    ASSERT_TRUE(a.has(key)) << key;
    EXPECT_EQ(a.metadata().at(key), value) << key;
  }
}

// A config.json made of llama.cpp's keys says the same again.
TEST(GgufConfig, TextOfAForeignFileIsAConfigJson) {
  const std::string text = gguf_config_text(Written(docs_keys()).open());
  const Config c =
      read_config(io::JsonReader(nlohmann::json::parse(text), "config.json"), compatibility("transformers"));
  expect_same(c, read_config_file(kDocs, "transformers"));
}

}  // namespace
}  // namespace kilin
