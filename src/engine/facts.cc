// SPDX-License-Identifier: Apache-2.0
#include "engine/facts.h"

#include <fmt/format.h>

#include <map>

#include "base/cpu.h"

namespace kilin {
namespace {

const char* cache_type_name(Dtype dtype) {
  return dtype == Dtype::kF16 ? "float16" : dtype == Dtype::kBF16 ? "bfloat16" : "float32";
}

// Parameters and bytes by what a token reads of them.
struct Totals {
  int64_t parameters = 0, bytes = 0;
  double active_parameters = 0, active_bytes = 0;
  std::map<std::string, int64_t> by_type;
};

Totals add_up(const LoadedModel& model) {
  const Config& c = model.config();
  Totals t;
  for (const NamedWeight& w : model.table()) {
    const int64_t n = w.view.elements();
    const auto bytes = static_cast<int64_t>(w.view.bytes());
    // The correction bias is stored but not trained by gradients (a buffer in torch): not counted as a
    // parameter there.
    const bool buffer = w.parameter.name.ends_with("e_score_correction_bias");
    if (!buffer) t.parameters += n;
    t.bytes += bytes;
    t.by_type[std::string(dtype_name(w.view.dtype))] += n;
    double used = 1.0;
    if (w.parameter.role == Role::kExpert)
      used = static_cast<double>(c.moe.top_k) / static_cast<double>(c.moe.experts);
    if (w.parameter.role == Role::kEmbedding)
      used = c.tied_head ? 1.0 : 0.0;  // one row; whole as a tied head
    if (!buffer) t.active_parameters += used * static_cast<double>(n);
    t.active_bytes += used * static_cast<double>(bytes);
  }
  return t;
}

std::vector<std::pair<std::string, std::string>> details(const Engine& engine, const Totals& totals) {
  const Config& c = engine.config();
  const LinearAttentionConfig& a = c.linear;
  std::vector<std::pair<std::string, std::string>> d;
  std::string kinds;
  for (LayerKind kind : c.layers)
    kinds += kind == LayerKind::kKda ? 'K' : kind == LayerKind::kGdn ? 'G' : 'M';
  d.emplace_back("layer order", kinds + " (K KDA, G GDN, M MLA)");
  if (c.count(LayerKind::kMla) < c.layer_count()) {
    d.emplace_back("linear attention",
                   fmt::format("{} heads, {} value heads, key {} x value {}, convolution {}", a.heads,
                               a.value_heads, a.key_dim, a.value_dim, a.conv_taps));
    d.emplace_back("forget gate",
                   a.gate_lower_bound ? fmt::format("bounded, {}", *a.gate_lower_bound) : "softplus");
    d.emplace_back("output gate", a.output_gate == OutputGate::kNone   ? "none"
                                  : a.output_gate == OutputGate::kSilu ? "silu"
                                                                       : "sigmoid");
  }
  if (c.count(LayerKind::kMla) > 0) {
    d.emplace_back("latent attention",
                   fmt::format("{} heads, latent {}, key {} + {} shared, value {}", c.mla.heads, c.mla.latent,
                               c.mla.nope, c.mla.rope, c.mla.value));
    d.emplace_back("latent cache", cache_type_name(engine.cache().latent_type()));
    d.emplace_back("positions", c.mla.use_rope ? fmt::format("RoPE, theta {}", c.mla.rope_theta) : "none");
    d.emplace_back("latent norm eps", fmt::format("{}", c.mla.latent_norm_eps));
  }
  if (c.moe.experts > 0) {
    d.emplace_back("experts", fmt::format("{} of width {}, {} per token, {} shared", c.moe.experts,
                                          c.moe.width, c.moe.top_k, c.moe.shared));
    d.emplace_back("router", fmt::format("{}, {}, times {}, weights {} the correction bias",
                                         c.moe.sigmoid_router ? "sigmoid" : "softmax",
                                         c.moe.renormalize ? "renormalised" : "not renormalised", c.moe.scale,
                                         c.moe.biased_weights ? "with" : "without"));
  }
  d.emplace_back("activations",
                 engine.rounds_activations() ? "rounded in products and latent attention" : "exact");
  d.emplace_back("head", c.tied_head ? "tied to the embedding" : "own");
  for (const LoraAdapter& adapter : engine.model().lora().adapters()) {
    d.emplace_back("adapter",
                   fmt::format("{} (rank {}, times {:.4g}, {} matrices, now float32)", adapter.directory(),
                               adapter.rank(), adapter.scale(), adapter.pairs().size()));
  }
  for (const auto& [type, n] : totals.by_type) d.emplace_back("parameters in " + type, fmt::format("{}", n));
  d.emplace_back("cpu", fmt::format("{} threads, {}", engine.threads(), isa_name(active_isa())));
  return d;
}

}  // namespace

ModelInfo model_facts(const Engine& engine, const std::string& path) {
  const Config& c = engine.config();
  const Totals totals = add_up(engine.model());
  ModelInfo info;
  info.path = path;
  info.architecture = c.architecture;
  info.compatibility = compatibility(c.compatibility).summary;
  info.layers = c.layer_count();
  info.kda_layers = c.count(LayerKind::kKda);
  info.gdn_layers = c.count(LayerKind::kGdn);
  info.mla_layers = c.count(LayerKind::kMla);
  for (bool sparse : c.sparse) info.moe_layers += sparse ? 1 : 0;
  info.hidden_size = c.hidden;
  info.vocab_size = c.vocab_size;
  info.max_length = c.max_length;
  info.parameters = totals.parameters;
  info.active_parameters = static_cast<int64_t>(totals.active_parameters);
  info.weight_bytes = totals.bytes;
  info.active_weight_bytes = static_cast<int64_t>(totals.active_bytes);
  info.state_bytes_per_sequence = engine.cache().state_bytes();
  info.cache_bytes_per_token = engine.cache().bytes_per_token();
  info.activations = engine.rounds_activations() ? "rounded" : "exact";
  info.details = details(engine, totals);
  return info;
}

}  // namespace kilin
