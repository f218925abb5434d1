// SPDX-License-Identifier: Apache-2.0
#include "model/config_text.h"

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace kilin {
namespace {

using Json = nlohmann::ordered_json;

std::vector<int64_t> layers_of(const Config& c, LayerKind kind) {
  std::vector<int64_t> numbers;  // from 1
  for (size_t i = 0; i < c.layers.size(); ++i) {
    if (c.layers[i] == kind) numbers.push_back(static_cast<int64_t>(i) + 1);
  }
  return numbers;
}

Json linear_section(const Config& c) {
  const LinearAttentionConfig& a = c.linear;
  Json json = {{"full_attn_layers", layers_of(c, LayerKind::kMla)},
               {"kda_layers", layers_of(c, LayerKind::kKda)}};
  if (c.count(LayerKind::kGdn) > 0) json["gdn_layers"] = layers_of(c, LayerKind::kGdn);
  if (c.count(LayerKind::kMla) == c.layer_count()) return json;
  json["num_heads"] = a.heads;
  json["head_dim"] = a.key_dim;
  json["short_conv_kernel_size"] = a.conv_taps;
  if (a.value_heads != a.heads) json["num_value_heads"] = a.value_heads;
  if (a.value_dim != a.key_dim) json["value_head_dim"] = a.value_dim;
  if (a.gate_lower_bound) json["gate_lower_bound"] = *a.gate_lower_bound;
  if (a.output_gate == OutputGate::kNone) json["output_gate"] = "none";
  if (a.output_gate == OutputGate::kSilu) json["output_gate"] = "silu";
  return json;
}

void add_experts(const Config& c, Json& json) {
  const MoeConfig& m = c.moe;
  json["num_experts"] = m.experts;
  if (m.experts == 0) return;
  json["num_experts_per_token"] = m.top_k;
  json["num_shared_experts"] = m.shared;
  json["moe_intermediate_size"] = m.width;
  json["moe_renormalize"] = m.renormalize;
  json["routed_scaling_factor"] = m.scale;
  json["moe_router_activation_func"] = m.sigmoid_router ? "sigmoid" : "softmax";
  json["use_grouped_topk"] = true;
  json["num_expert_group"] = m.groups;
  json["topk_group"] = m.groups_kept;
  size_t first = 0;
  while (first < c.sparse.size() && !c.sparse[first]) ++first;
  bool simple = true;
  for (size_t i = first; i < c.sparse.size(); ++i) simple = simple && c.sparse[i];
  if (simple) {
    json["first_k_dense_replace"] = first;
    json["moe_layer_freq"] = 1;
    return;
  }
  json["mlp_layer_types"] = Json::array();
  for (const bool sparse : c.sparse) json["mlp_layer_types"].push_back(sparse ? "sparse" : "dense");
}

}  // namespace

std::string config_text(const Config& c, const std::string& dtype) {
  Json json = {{"architectures", {c.architecture}}, {"model_type", "kimi_linear"}, {"dtype", dtype}};
  json["vocab_size"] = c.vocab_size;
  json["hidden_size"] = c.hidden;
  json["num_hidden_layers"] = c.layer_count();
  json["intermediate_size"] = c.dense_width;
  json["hidden_act"] = "silu";
  json["rms_norm_eps"] = c.norm_eps;
  json["tie_word_embeddings"] = c.tied_head;
  json["model_max_length"] = c.max_length;
  json["linear_attn_config"] = linear_section(c);
  json["num_attention_heads"] = json["num_key_value_heads"] = c.mla.heads;
  json["q_lora_rank"] = nullptr;
  json["kv_lora_rank"] = c.mla.latent;
  json["qk_nope_head_dim"] = c.mla.nope;
  json["qk_rope_head_dim"] = c.mla.rope;
  json["v_head_dim"] = c.mla.value;
  json["mla_use_nope"] = !c.mla.use_rope;
  json["rope_theta"] = c.mla.rope_theta;
  add_experts(c, json);
  // null, not left out: transformers' class has the ids of the 48B model as defaults, and refuses to load a
  // model whose vocabulary they are not in.
  json["bos_token_id"] = json["eos_token_id"] = json["pad_token_id"] = nullptr;
  if (c.bos_id) json["bos_token_id"] = *c.bos_id;
  if (c.eos_ids.size() == 1) json["eos_token_id"] = c.eos_ids.front();
  if (c.eos_ids.size() > 1) json["eos_token_id"] = c.eos_ids;
  return json.dump(2) + "\n";
}

std::string config_text_with_dtype(const std::string& text, const std::string& file,
                                   const std::string& dtype) {
  Json json = Json::parse(text, nullptr, false);
  check(json.is_object(), "{}: is no JSON object, expected a model's configuration", file);
  json.erase("auto_map");
  json.erase("torch_dtype");
  json["dtype"] = dtype;
  return json.dump(2) + "\n";
}

}  // namespace kilin
