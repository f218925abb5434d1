// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "model/config.h"

namespace kilin {

void check_config(const Config& c, const std::string& file) {
  const bool any_dense = std::find(c.sparse.begin(), c.sparse.end(), false) != c.sparse.end();
  check(!any_dense || c.dense_width > 0, "{}: key 'intermediate_size': missing, but a layer has a dense MLP",
        file);
  if (c.count(LayerKind::kMla) < c.layer_count()) {
    check(c.linear.value_heads % c.linear.heads == 0,
          "{}: key 'linear_attn_config.num_value_heads': found {}, expected a multiple of num_heads = {}",
          file, c.linear.value_heads, c.linear.heads);
    const int64_t width = c.linear.value_heads * std::max(c.linear.key_dim, c.linear.value_dim);
    check(width <= int64_t{1} << 24, "{}: linear attention of {} heads x {} is too wide", file,
          c.linear.value_heads, std::max(c.linear.key_dim, c.linear.value_dim));
    check(!c.linear.gate_lower_bound || c.count(LayerKind::kGdn) == 0,
          "{}: key 'linear_attn_config.gate_lower_bound': defined for KDA layers only, but there are GDN "
          "layers",
          file);
  }
  check(c.mla.heads * (c.mla.nope + c.mla.rope + c.mla.value) <= int64_t{1} << 26,
        "{}: key 'num_attention_heads': {} heads of width {} are too wide", file, c.mla.heads,
        c.mla.nope + c.mla.rope);
  if (c.moe.experts > 0) {
    // Offsets into stacked experts are counted in elements: keep them far from overflow.
    check(c.moe.experts * c.moe.width <= int64_t{1} << 34 && c.moe.shared * c.moe.width <= int64_t{1} << 24,
          "{}: key 'moe_intermediate_size': {} experts of width {} are too many", file, c.moe.experts,
          c.moe.width);
    check(c.moe.experts % c.moe.groups == 0,
          "{}: key 'num_expert_group': found {}, expected a divisor of {} experts", file, c.moe.groups,
          c.moe.experts);
    check(c.moe.top_k <= c.moe.experts / c.moe.groups * c.moe.groups_kept,
          "{}: key 'num_experts_per_token': found {}, but the {} kept groups hold {} experts", file,
          c.moe.top_k, c.moe.groups_kept, c.moe.experts / c.moe.groups * c.moe.groups_kept);
  }
}

}  // namespace kilin
