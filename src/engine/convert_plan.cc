// SPDX-License-Identifier: Apache-2.0
#include "engine/convert_plan.h"

#include <array>
#include <map>

#include "base/error.h"
#include "model/gguf_names.h"
#include "quant/formats.h"

namespace kilin {
namespace {

Shape gguf_shape(const Parameter& p, const std::string& name) {
  // ne [taps, 1, channels, 1] and [1, heads, 1, 1]
  if (p.role == Role::kConv) return {1, p.shape[0], 1, p.shape[2]};
  if (name.ends_with(".ssm_a")) return {1, 1, element_count(p.shape), 1};
  return p.shape;
}

void add_split_kv_b(const std::string& whole, size_t parameter, const MlaConfig& a,
                    std::vector<PlannedTensor>& plan) {
  const std::string prefix = whole.substr(0, whole.find("attn_kv_b"));
  plan.push_back({prefix + "attn_k_b.weight",
                  {a.heads, a.latent, a.nope},
                  Role::kProjection,
                  Content::kKeyRows,
                  {parameter}});
  plan.push_back({prefix + "attn_v_b.weight",
                  {a.heads, a.value, a.latent},
                  Role::kProjection,
                  Content::kValueRows,
                  {parameter}});
}

bool ends_with_any(std::string_view name, std::initializer_list<std::string_view> ends) {
  for (const std::string_view end : ends) {
    if (name.ends_with(end)) return true;
  }
  return false;
}

// The projections that steer gates: few, small, and the model is sensitive to them.
bool is_gate(std::string_view name) {
  return ends_with_any(name, {".ssm_f_a.weight", ".ssm_f_b.weight", ".ssm_g_a.weight", ".ssm_g_b.weight",
                              ".ssm_beta.weight", ".ssm_alpha.weight"});
}

bool is_latent(std::string_view name) {
  return ends_with_any(name, {".attn_k_b.weight", ".attn_v_b.weight", ".attn_kv_a_mqa.weight"});
}

Dtype wanted_dtype(WeightType type, Dtype source, const PlannedTensor& t) {
  if (t.role == Role::kVector || t.role == Role::kConv || t.role == Role::kRouter) return Dtype::kF32;
  switch (type) {
    case WeightType::kAuto:
      // Types that are read only can be copied as they are, but not made anew.
      return t.content == Content::kWhole || quant::writable(source) ? source : Dtype::kQ8_0;
    case WeightType::kF32:
      return Dtype::kF32;
    case WeightType::kBF16:
      return Dtype::kBF16;
    default:
      break;
  }
  if (is_gate(t.name)) return source == Dtype::kF32 ? Dtype::kF32 : Dtype::kBF16;
  if (type == WeightType::kQ8_0) return Dtype::kQ8_0;
  if (t.role == Role::kEmbedding || t.role == Role::kHead || is_latent(t.name)) return Dtype::kQ8_0;
  return type == WeightType::kQ4_0 ? Dtype::kQ4_0 : Dtype::kQ4_K;
}

}  // namespace

std::vector<PlannedTensor> plan_gguf(const std::vector<Parameter>& parameters, const Config& config) {
  std::vector<PlannedTensor> plan;
  std::map<std::string, size_t> stacked;  // name -> index in plan
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    const std::string name = gguf_name(p);
    KILIN_ASSERT(!name.empty());
    if (p.role == Role::kExpert) {
      const auto [at, added] = stacked.emplace(name, plan.size());
      if (added)
        plan.push_back({name, {config.moe.experts, p.shape[0], p.shape[1]}, p.role, Content::kWhole, {}});
      plan[at->second].parameters.push_back(i);
    } else if (name.ends_with(".attn_kv_b.weight")) {
      add_split_kv_b(name, i, config.mla, plan);
    } else {
      const Content content = name.ends_with(".ssm_a") ? Content::kNegativeExp : Content::kWhole;
      plan.push_back({name, gguf_shape(p, name), p.role, content, {i}});
    }
  }
  return plan;
}

void choose_dtype(WeightType type, Dtype source, PlannedTensor& t) {
  t.dtype = wanted_dtype(type, source, t);
  const auto fits = [&](Dtype dtype) { return t.shape.back() % dtype_block(dtype) == 0; };
  t.fell_back = !fits(t.dtype);
  if (!fits(t.dtype)) t.dtype = fits(Dtype::kQ8_0) ? Dtype::kQ8_0 : Dtype::kBF16;
}

}  // namespace kilin
