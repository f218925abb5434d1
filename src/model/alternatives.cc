// SPDX-License-Identifier: Apache-2.0
#include "model/alternatives.h"

#include <algorithm>

#include "model/gguf_names.h"

namespace kilin {
namespace {

// name with the last `from` replaced by `to`, or "" if it does not occur
std::string replaced(const std::string& name, const std::string& from, const std::string& to) {
  const size_t at = name.rfind(from);
  return at == std::string::npos ? "" : name.substr(0, at) + to + name.substr(at + from.size());
}

void add(std::vector<TensorSource>& sources, std::string name, const Shape& shape, int64_t offset = 0) {
  if (name.empty()) return;
  TensorSource source;
  source.name = std::move(name);
  source.shape = shape;
  source.offset = offset;
  sources.push_back(std::move(source));
}

void add_fused_convolution(const Parameter& p, const Config& c, std::vector<TensorSource>& sources) {
  const int64_t qk = c.linear.heads * c.linear.key_dim;
  const int64_t v = c.linear.value_heads * c.linear.value_dim;
  const Shape fused{2 * qk + v, 1, c.linear.conv_taps};
  add(sources, replaced(p.name, ".q_conv1d.", ".conv1d."), fused, 0);
  add(sources, replaced(p.name, ".k_conv1d.", ".conv1d."), fused, qk * c.linear.conv_taps);
  add(sources, replaced(p.name, ".v_conv1d.", ".conv1d."), fused, 2 * qk * c.linear.conv_taps);
}

// experts.E.w1.weight under the stacked tensors of transformers' class: gate_up_proj [E][2 width][hidden]
// (gate rows first), down_proj [E][hidden][width]
void add_stacked_expert(const std::string& name, const Config& c, std::vector<TensorSource>& sources) {
  const size_t at = name.find(".experts.");
  const std::string prefix = name.substr(0, at) + ".experts.";
  const size_t dot = name.find('.', prefix.size());
  const int64_t expert = std::stoll(name.substr(prefix.size(), dot - prefix.size()));
  const std::string which = name.substr(dot + 1, 2);
  const int64_t matrix = c.moe.width * c.hidden;
  if (which == "w2") {
    add(sources, prefix + "down_proj", {c.moe.experts, c.hidden, c.moe.width}, expert * matrix);
  } else {
    add(sources, prefix + "gate_up_proj", {c.moe.experts, 2 * c.moe.width, c.hidden},
        expert * 2 * matrix + (which == "w3" ? matrix : 0));
  }
}

void add_expert(const Parameter& p, const Config& c, std::vector<TensorSource>& sources) {
  for (const std::string& name : {p.name, replaced(p.name, ".block_sparse_moe.", ".mlp.")}) {
    add(sources, replaced(name, ".w1.", ".gate_proj."), p.shape);
    add(sources, replaced(name, ".w3.", ".up_proj."), p.shape);
    add(sources, replaced(name, ".w2.", ".down_proj."), p.shape);
    add_stacked_expert(name, c, sources);
  }
}

// blk.N.attn_k_b [heads][latent][nope] and blk.N.attn_v_b [heads][value][latent] for kv_b_proj; older files
// have it whole, under the name in gguf_names.h.
void add_split_kv_b(const std::string& whole, const Config& c, std::vector<TensorSource>& sources) {
  TensorSource source;
  source.name = replaced(whole, "attn_kv_b", "attn_k_b");
  source.shape = {c.mla.heads, c.mla.latent, c.mla.nope};
  source.transform = Transform::kJoinHeads;
  source.second_name = replaced(whole, "attn_kv_b", "attn_v_b");
  source.second_shape = {c.mla.heads, c.mla.value, c.mla.latent};
  sources.push_back(std::move(source));
}

// GGUF's names. Its convolutions are [1][channels][1][taps], or without the leading 1 once quantised by
// llama.cpp's tool: same_shape() takes both.
void add_gguf(const Parameter& p, const Config& c, std::vector<TensorSource>& sources) {
  const std::string name = gguf_name(p);
  if (p.role == Role::kExpert) {
    const int64_t matrix = c.moe.width * c.hidden;
    Shape stacked{c.moe.experts};
    stacked.insert(stacked.end(), p.shape.begin(), p.shape.end());
    return add(sources, name, stacked, expert_number(p).value_or(0) * matrix);
  }
  if (name.ends_with(".attn_kv_b.weight")) add_split_kv_b(name, c, sources);
  add(sources, name, p.shape);
  if (name.ends_with(".ssm_a")) sources.back().transform = Transform::kLogOfNegative;
  add(sources, replaced(name, ".ssm_dt.bias", ".ssm_dt"), p.shape);
  add(sources, replaced(name, ".exp_probs_b.bias", ".exp_probs_b"), p.shape);
}

}  // namespace

std::vector<TensorSource> tensor_sources(const Parameter& p, const Config& c) {
  std::vector<TensorSource> sources;
  add(sources, p.name, p.shape);
  for (const char* gate : {".f_a_proj.", ".f_b_proj.", ".dt_bias", ".A_log"}) {
    add(sources,
        replaced(p.name, std::string(".self_attn") + gate, std::string(".self_attn.forget_gate") + gate),
        p.shape);
  }
  if (p.role == Role::kConv) add_fused_convolution(p, c, sources);
  add(sources, replaced(p.name, ".block_sparse_moe.", ".mlp."), p.shape);
  add(sources, replaced(p.name, ".mlp.", ".block_sparse_moe."), p.shape);
  if (p.role == Role::kExpert) add_expert(p, c, sources);
  add_gguf(p, c, sources);
  return sources;
}

bool same_shape(const Shape& stored, const Shape& expected, Role role) {
  if (role == Role::kVector) return element_count(stored) == element_count(expected);
  const auto squeezed = [](Shape s) {
    std::erase(s, 1);
    return s;
  };
  return squeezed(stored) == squeezed(expected);
}

}  // namespace kilin
