// SPDX-License-Identifier: Apache-2.0
#include "model/gguf_names.h"

#include <array>
#include <charconv>
#include <string_view>
#include <utility>

namespace kilin {
namespace {

constexpr std::string_view kLayer = "model.layers.";
constexpr std::string_view kExpert = "block_sparse_moe.experts.";

// Outside the layers.
constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kGlobal{{
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
}};

// Behind "model.layers.N." and behind "blk.N.".
constexpr std::array<std::pair<std::string_view, std::string_view>, 32> kInLayer{{
    {"input_layernorm.weight", "attn_norm.weight"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"self_attn.q_conv1d.weight", "ssm_conv1d_q.weight"},
    {"self_attn.k_conv1d.weight", "ssm_conv1d_k.weight"},
    {"self_attn.v_conv1d.weight", "ssm_conv1d_v.weight"},
    {"self_attn.f_a_proj.weight", "ssm_f_a.weight"},
    {"self_attn.f_b_proj.weight", "ssm_f_b.weight"},
    {"self_attn.g_a_proj.weight", "ssm_g_a.weight"},
    {"self_attn.g_b_proj.weight", "ssm_g_b.weight"},
    {"self_attn.b_proj.weight", "ssm_beta.weight"},
    {"self_attn.a_proj.weight", "ssm_alpha.weight"},
    {"self_attn.A_log", "ssm_a"},
    {"self_attn.dt_bias", "ssm_dt.bias"},
    {"self_attn.o_norm.weight", "ssm_norm.weight"},
    {"self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"},
    {"self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"},
    {"self_attn.kv_b_proj.weight", "attn_kv_b.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
    {"block_sparse_moe.gate.weight", "ffn_gate_inp.weight"},
    {"block_sparse_moe.gate.e_score_correction_bias", "exp_probs_b.bias"},
    {"block_sparse_moe.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"},
    {"block_sparse_moe.shared_experts.up_proj.weight", "ffn_up_shexp.weight"},
    {"block_sparse_moe.shared_experts.down_proj.weight", "ffn_down_shexp.weight"},
    {"w1.weight", "ffn_gate_exps.weight"},
    {"w3.weight", "ffn_up_exps.weight"},
    {"w2.weight", "ffn_down_exps.weight"},
}};

std::optional<std::string_view> after(std::string_view text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return std::nullopt;
  return text.substr(prefix.size());
}

// "3.rest" -> 3, with `text` moved behind the point
std::optional<int64_t> take_number(std::string_view& text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const auto length = static_cast<size_t>(end - text.data());
  if (error != std::errc{} || length >= text.size() || text[length] != '.') return std::nullopt;
  text.remove_prefix(length + 1);
  return number;
}

}  // namespace

std::string gguf_name(const Parameter& p) {
  for (const auto& [ours, theirs] : kGlobal) {
    if (p.name == ours) return std::string(theirs);
  }
  auto rest = after(p.name, kLayer);
  if (!rest) return "";
  const auto layer = take_number(*rest);
  if (!layer) return "";
  if (auto expert = after(*rest, kExpert); expert && take_number(*expert)) rest = expert;
  for (const auto& [ours, theirs] : kInLayer) {
    if (*rest == ours) return "blk." + std::to_string(*layer) + "." + std::string(theirs);
  }
  return "";
}

std::optional<int64_t> expert_number(const Parameter& p) {
  if (p.role != Role::kExpert) return std::nullopt;
  const size_t at = p.name.find(kExpert);
  if (at == std::string::npos) return std::nullopt;
  std::string_view rest = std::string_view(p.name).substr(at + kExpert.size());
  return take_number(rest);
}

}  // namespace kilin
