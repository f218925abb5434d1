// SPDX-License-Identifier: Apache-2.0
// Every member of the family that a config.json can ask for, small.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/json.h"
#include "model/config.h"
#include "support/reference.h"

namespace kilin::testing {

struct Variant {
  std::string name;
  nlohmann::json changes;  // merged into tiny-random's config.json
};

inline const std::vector<Variant>& variants() {
  static const std::vector<Variant> all{
      {"kimi_linear", nlohmann::json::object()},
      {"gdn", {{"linear_attn_config", {{"kda_layers", nlohmann::json::array()}, {"gdn_layers", {1, 2, 3}}}}}},
      {"kda_and_gdn", {{"linear_attn_config", {{"kda_layers", {1, 3}}, {"gdn_layers", {2}}}}}},
      {"mla_only",
       {{"linear_attn_config",
         {{"kda_layers", nlohmann::json::array()}, {"full_attn_layers", {1, 2, 3, 4}}}}}},
      {"kda_only",
       {{"linear_attn_config",
         {{"kda_layers", {1, 2, 3, 4}}, {"full_attn_layers", nlohmann::json::array()}}}}},
      {"rope", {{"mla_use_nope", false}, {"rope_theta", 500.0}}},
      {"bounded_gate", {{"linear_attn_config", {{"gate_lower_bound", -5.0}}}}},
      {"silu_output_gate", {{"linear_attn_config", {{"output_gate", "silu"}}}}},
      {"no_output_gate", {{"linear_attn_config", {{"output_gate", "none"}}}}},
      {"no_convolution", {{"linear_attn_config", {{"short_conv_kernel_size", 1}}}}},
      {"two_taps", {{"linear_attn_config", {{"short_conv_kernel_size", 2}}}}},
      {"grouped_value_heads", {{"linear_attn_config", {{"num_value_heads", 4}, {"value_head_dim", 24}}}}},
      {"gdn_grouped",
       {{"linear_attn_config",
         {{"kda_layers", nlohmann::json::array()}, {"gdn_layers", {1, 2, 3}}, {"num_value_heads", 6}}}}},
      {"dense", {{"num_experts", 0}}},
      {"expert_groups", {{"num_expert_group", 4}, {"topk_group", 2}, {"num_experts_per_token", 3}}},
      {"softmax_router", {{"moe_router_activation_func", "softmax"}, {"moe_renormalize", false}}},
      {"no_shared_expert", {{"num_shared_experts", 0}}},
      {"two_shared_experts", {{"num_shared_experts", 2}}},
      {"every_second_sparse", {{"moe_layer_freq", 2}, {"first_k_dense_replace", 0}}},
      {"tied_head", {{"tie_word_embeddings", true}}},
      {"no_shared_key_part", {{"qk_rope_head_dim", 0}}},
  };
  return all;
}

inline Config config_of(const Variant& variant, const std::string& compat) {
  nlohmann::json json = io::parse_json_file(reference_path("tiny-random/config.json"));
  json.merge_patch(variant.changes);
  return read_config(io::JsonReader(json, variant.name), compatibility(compat));
}

}  // namespace kilin::testing
