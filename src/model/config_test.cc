// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "model/alternatives.h"
#include "model/parameters.h"

namespace kilin {
namespace {

using Json = nlohmann::json;

// The published config.json of Kimi-Linear-48B-A3B-Instruct.
Json kimi48b() {
  return Json::parse(R"({
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"}, "transformers_version": "4.57.1",
    "vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27, "intermediate_size": 9216,
    "moe_intermediate_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 72,
    "hidden_act": "silu", "rms_norm_eps": 1e-05, "initializer_range": 0.02,
    "linear_attn_config": {
      "kda_layers": [1,2,3,5,6,7,9,10,11,13,14,15,17,18,19,21,22,23,25,26],
      "full_attn_layers": [4,8,12,16,20,24,27], "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
    "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "mla_use_nope": true, "rope_theta": 10000.0, "rope_scaling": null, "num_experts": 256,
    "num_experts_per_token": 8, "num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid", "moe_renormalize": true, "routed_scaling_factor": 2.446,
    "use_grouped_topk": true, "num_expert_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    "tie_word_embeddings": false, "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
    "model_max_length": 1048576, "use_cache": true})");
}

Config read(const Json& json, const std::string& compat = "transformers") {
  return read_config(io::JsonReader(json, "config.json"), compatibility(compat));
}

std::string error_with(const Json& changes) {
  Json json = kimi48b();
  json.merge_patch(changes);
  try {
    read(json);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Config, the_published_48b_has_the_published_tensors) {
  const Config c = read(kimi48b());
  EXPECT_EQ(c.count(LayerKind::kKda), 20);
  EXPECT_EQ(c.count(LayerKind::kMla), 7);
  EXPECT_EQ(c.layers[26], LayerKind::kMla);
  EXPECT_EQ(c.layers[25], LayerKind::kKda);
  EXPECT_FALSE(c.sparse[0]);
  EXPECT_TRUE(c.sparse[1]);
  struct Nothing {};
  ModelWeights<Nothing> weights(c);
  int64_t tensors = 0, parameters = 0;
  visit_parameters(weights, c, [&](const Parameter& p, Nothing&) {
    ++tensors;
    parameters += element_count(p.shape);
  });
  EXPECT_EQ(tensors, 20493);  // the index of the published checkpoint
  EXPECT_EQ(parameters, 49122681728);
}

TEST(Config, keys_that_transformers_writes_mean_the_same) {
  Json json = kimi48b();
  Json types = Json::array(), mlps = Json::array();
  const Config original = read(json);
  for (size_t i = 0; i < 27; ++i) {
    types.push_back(original.layers[i] == LayerKind::kMla ? "full_attention" : "linear_attention");
    mlps.push_back(original.sparse[i] ? "sparse" : "dense");
  }
  for (const char* key :
       {"linear_attn_config", "num_experts", "num_experts_per_token", "num_shared_experts",
        "num_expert_group", "moe_renormalize", "model_max_length", "first_k_dense_replace", "moe_layer_freq",
        "use_grouped_topk", "moe_router_activation_func", "mla_use_nope"}) {
    json.erase(key);
  }
  json.merge_patch({{"layer_types", types},
                    {"mlp_layer_types", mlps},
                    {"linear_head_dim", 128},
                    {"linear_num_heads", 32},
                    {"linear_conv_kernel_dim", 4},
                    {"num_local_experts", 256},
                    {"num_experts_per_tok", 8},
                    {"n_shared_experts", 1},
                    {"n_group", 1},
                    {"norm_topk_prob", true},
                    {"max_position_embeddings", 1048576},
                    {"attention_bias", false},
                    {"attention_dropout", 0.0},
                    {"pretraining_tp", 1}});
  const Config c = read(json);
  EXPECT_EQ(c.layers, original.layers);
  EXPECT_EQ(c.sparse, original.sparse);
  EXPECT_EQ(c.moe.experts, 256);
  EXPECT_EQ(c.moe.top_k, 8);
  EXPECT_EQ(c.linear.key_dim, 128);
  EXPECT_EQ(c.max_length, 1048576);
}

TEST(Config, compatibility_chooses_the_quirks_in_one_place) {
  const Config native = read(kimi48b()), remote = read(kimi48b(), "remote-code"),
               vllm = read(kimi48b(), "vllm");
  EXPECT_FALSE(native.moe.biased_weights);
  EXPECT_TRUE(remote.moe.biased_weights);
  EXPECT_FALSE(vllm.moe.biased_weights);
  EXPECT_EQ(native.mla.latent_norm_eps, 1e-6);
  EXPECT_EQ(remote.mla.latent_norm_eps, 1e-6);
  EXPECT_EQ(vllm.mla.latent_norm_eps, 1e-5);
  EXPECT_THROW(compatibility("huggingface"), Error);
}

TEST(Config, what_kilin_does_not_compute_is_refused_with_file_and_key) {
  const std::vector<std::pair<Json, std::string>> cases{
      {{{"architectures", {"LlamaForCausalLM"}}}, "architectures"},
      {{{"model_type", "llama"}}, "model_type"},
      {{{"sliding_window", 4096}}, "sliding_window"},
      {{{"linear_attn_config", {{"allow_neg_eigval", true}}}}, "linear_attn_config.allow_neg_eigval"},
      {{{"hidden_act", "gelu"}}, "hidden_act"},
      {{{"q_lora_rank", 1536}}, "q_lora_rank"},
      {{{"num_key_value_heads", 8}}, "num_key_value_heads"},
      {{{"num_nextn_predict_layers", 1}}, "num_nextn_predict_layers"},
      {{{"attention_bias", true}}, "attention_bias"},
      {{{"quantization_config", {{"bits", 4}}}}, "quantization_config"},
      {{{"moe_router_activation_func", "relu"}}, "moe_router_activation_func"},
      {{{"mla_use_nope", false}, {"rope_scaling", {{"type", "yarn"}}}}, "rope_scaling"},
      {{{"vocab_size", nullptr}}, "vocab_size"},
      {{{"hidden_size", "big"}}, "hidden_size"},
      {{{"num_hidden_layers", 0}}, "num_hidden_layers"},
      {{{"num_hidden_layers", 28}}, "layer 28"},
      {{{"num_experts_per_token", 300}}, "num_experts_per_token"},
      {{{"num_expert_group", 3}}, "num_expert_group"},
      {{{"eos_token_id", 163840}}, "eos_token_id"},
      {{{"linear_attn_config", {{"kda_layers", {0, 1, 2}}}}}, "layer 0"},
      {{{"linear_attn_config", {{"full_attn_layers", {1, 4, 8, 12, 16, 20, 24, 27}}}}}, "listed twice"},
      {{{"linear_attn_config", {{"full_attn_layers", {4, 8}}}}}, "layer 12"},
      {{{"linear_attn_config", nullptr}}, "layer_types"},
      {{{"linear_attn_config", {{"num_value_heads", 33}}}}, "num_value_heads"},
      {{{"linear_attn_config", {{"gate_lower_bound", 5}}}}, "gate_lower_bound"},
      {{{"linear_attn_config", {{"head_dim", 512}}}}, "linear_attn_config.head_dim"},
      {{{"intermediate_size", nullptr}}, "intermediate_size"},
      {{{"routed_scaling_factor", nullptr}}, "routed_scaling_factor"},
      {{{"layer_types", {"full_attention"}}}, "layer_types"},
  };
  for (const auto& [changes, expected] : cases) {
    const std::string error = error_with(changes);
    EXPECT_NE(error.find("config.json"), std::string::npos) << changes << ": " << error;
    EXPECT_NE(error.find(expected), std::string::npos) << changes << ": " << error;
  }
}

TEST(Alternatives, find_native_names_and_stacked_parts) {
  const Config c = read(kimi48b());
  const auto names = [&](const Parameter& p) {
    std::vector<std::string> list;
    for (const auto& s : tensor_sources(p, c)) list.push_back(s.name);
    return list;
  };
  const std::string layer = "model.layers.3.";
  const auto has = [](const std::vector<std::string>& list, const std::string& name) {
    return std::find(list.begin(), list.end(), name) != list.end();
  };
  EXPECT_TRUE(has(names({layer + "self_attn.A_log", {1, 1, 32, 1}, Role::kVector}),
                  layer + "self_attn.forget_gate.A_log"));
  EXPECT_TRUE(has(names({layer + "mlp.up_proj.weight", {9216, 2304}, Role::kProjection}),
                  layer + "block_sparse_moe.up_proj.weight"));
  const Parameter expert{layer + "block_sparse_moe.experts.17.w3.weight", {1024, 2304}, Role::kExpert};
  EXPECT_TRUE(has(names(expert), layer + "mlp.experts.17.up_proj.weight"));
  for (const auto& s : tensor_sources(expert, c)) {
    if (s.name != layer + "mlp.experts.gate_up_proj") continue;
    EXPECT_EQ(s.shape, (Shape{256, 2048, 2304}));
    EXPECT_EQ(s.offset, (17 * 2 + 1) * 1024 * 2304);
  }
  EXPECT_TRUE(same_shape({4096, 4}, {4096, 1, 4}, Role::kConv));
  EXPECT_TRUE(same_shape({32, 1}, {1, 1, 32, 1}, Role::kVector));
  EXPECT_FALSE(same_shape({2304, 1024}, {1024, 2304}, Role::kExpert));
}

}  // namespace
}  // namespace kilin
