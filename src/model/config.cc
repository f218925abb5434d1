// SPDX-License-Identifier: Apache-2.0
#include "model/config.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/printable.h"

namespace kilin {
namespace {

constexpr int64_t kMaxDimension = 1 << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeadDim = 256;

// The value under any of the names that different writers use for one key; the first name is used in errors.
std::string_view present_key(const io::JsonReader& json, std::initializer_list<std::string_view> names) {
  for (std::string_view name : names) {
    if (json.has(name)) return name;
  }
  return *names.begin();
}

int64_t integer(const io::JsonReader& json, std::initializer_list<std::string_view> names, int64_t low,
                int64_t high) {
  return json.integer(present_key(json, names), low, high);
}

int64_t integer_or(const io::JsonReader& json, std::initializer_list<std::string_view> names,
                   int64_t fallback, int64_t low, int64_t high) {
  return json.integer_or(present_key(json, names), fallback, low, high);
}

// A key that must hold one value because Kilin computes nothing else.
void require_false(const io::JsonReader& json, std::string_view key) {
  if (json.boolean_or(key, false)) json.refuse(key, "false (Kilin does not compute this)");
}

void require_null(const io::JsonReader& json, std::string_view key) {
  if (json.has(key)) json.refuse(key, "null (Kilin does not compute this)");
  json.ignore({key});
}

void mark_layers(const io::JsonReader& lists, std::string_view key, LayerKind kind,
                 std::vector<std::optional<LayerKind>>& layers) {
  if (!lists.has(key)) return;
  for (int64_t number : lists.integers(key)) {
    const auto count = static_cast<int64_t>(layers.size());
    check(number >= 1 && number <= count,
          "{}: key '{}': found layer {}, expected 1 to {} (layers count from 1)", lists.file(),
          lists.key_path(key), number, count);
    auto& layer = layers[static_cast<size_t>(number - 1)];
    check(!layer.has_value(), "{}: key '{}': layer {} is listed twice", lists.file(), lists.key_path(key),
          number);
    layer = kind;
  }
}

// Files that transformers wrote have both the lists and layer_types, which must agree.
void check_layer_types(const io::JsonReader& json, const std::vector<std::optional<LayerKind>>& layers) {
  json.ignore({"layer_types"});
  if (!json.has("layer_types")) return;
  const auto names = json.strings("layer_types");
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool full = i < names.size() && names[i] == "full_attention";
    check(names.size() == layers.size() && (!layers[i] || full == (*layers[i] == LayerKind::kMla)),
          "{}: key 'layer_types': contradicts the lists of 'linear_attn_config' at layer {}", json.file(),
          i + 1);
  }
}

std::vector<LayerKind> layer_kinds(const io::JsonReader& json, const std::optional<io::JsonReader>& lists,
                                   int64_t count) {
  std::vector<std::optional<LayerKind>> layers(static_cast<size_t>(count));
  if (lists && (lists->has("kda_layers") || lists->has("gdn_layers") || lists->has("full_attn_layers"))) {
    mark_layers(*lists, "kda_layers", LayerKind::kKda, layers);
    mark_layers(*lists, "gdn_layers", LayerKind::kGdn, layers);
    mark_layers(*lists, "full_attn_layers", LayerKind::kMla, layers);
    check_layer_types(json, layers);
  } else if (json.has("layer_types")) {
    const auto names = json.strings("layer_types");
    check(static_cast<int64_t>(names.size()) == count, "{}: key 'layer_types': found {} entries, expected {}",
          json.file(), names.size(), count);
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == "linear_attention") {
        layers[i] = LayerKind::kKda;
      } else if (names[i] == "full_attention") {
        layers[i] = LayerKind::kMla;
      } else {
        json.refuse("layer_types", "'linear_attention' or 'full_attention' for every layer");
      }
    }
  } else {
    fail(
        "{}: neither 'linear_attn_config.kda_layers' with 'full_attn_layers' nor 'layer_types' says the kind "
        "of "
        "each layer (implementations differ in their defaults)",
        json.file());
  }
  std::vector<LayerKind> kinds;
  for (size_t i = 0; i < layers.size(); ++i) {
    check(layers[i].has_value(),
          "{}: layer {} of {} is in none of 'linear_attn_config.kda_layers' and "
          "'full_attn_layers'",
          json.file(), i + 1, count);
    kinds.push_back(*layers[i]);
  }
  return kinds;
}

LinearAttentionConfig read_linear(const io::JsonReader& json, const std::optional<io::JsonReader>& section) {
  LinearAttentionConfig c;
  if (!section) {  // the flat keys of transformers' class
    c.heads = c.value_heads = json.integer("linear_num_heads", 1, kMaxDimension);
    c.key_dim = c.value_dim = json.integer("linear_head_dim", 1, kMaxHeadDim);
    c.conv_taps = json.integer_or("linear_conv_kernel_dim", 4, 1, 8);
    return c;
  }
  json.ignore({"linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"});
  c.heads = section->integer("num_heads", 1, kMaxDimension);
  c.key_dim = section->integer("head_dim", 1, kMaxHeadDim);
  c.conv_taps = section->integer("short_conv_kernel_size", 1, 8);
  // Beyond Moonshot's checkpoints: what ablations and relatives of the model need.
  c.value_heads = section->integer_or("num_value_heads", c.heads, 1, kMaxDimension);
  c.value_dim = section->integer_or("value_head_dim", c.key_dim, 1, kMaxHeadDim);
  if (section->has("gate_lower_bound")) {
    c.gate_lower_bound = section->number("gate_lower_bound", -1e4, 0.0);
    if (*c.gate_lower_bound >= 0.0) section->refuse("gate_lower_bound", "a negative number");
  }
  if (section->has("output_gate")) {
    const std::string gate = section->choice("output_gate", {"sigmoid", "silu", "swish", "none"});
    c.output_gate = gate == "none"      ? OutputGate::kNone
                    : gate == "sigmoid" ? OutputGate::kSigmoid
                                        : OutputGate::kSilu;
  }
  section->ignore({"gate_lower_bound", "output_gate"});
  return c;
}

MlaConfig read_mla(const io::JsonReader& json, const Compatibility& compat, double norm_eps) {
  MlaConfig c;
  c.heads = json.integer("num_attention_heads", 1, kMaxDimension);
  const int64_t kv_heads = json.integer_or("num_key_value_heads", c.heads, 1, kMaxDimension);
  if (kv_heads != c.heads) {
    json.refuse("num_key_value_heads",
                fmt::format("{} as 'num_attention_heads' (latent attention)", c.heads));
  }
  require_null(json, "q_lora_rank");
  c.latent = json.integer("kv_lora_rank", 1, kMaxDimension);
  c.nope = json.integer("qk_nope_head_dim", 1, kMaxDimension);
  c.rope = json.integer("qk_rope_head_dim", 0, kMaxDimension);
  c.value = json.integer("v_head_dim", 1, kMaxDimension);
  c.use_rope = !json.boolean_or("mla_use_nope", true);
  c.rope_theta = json.number_or("rope_theta", 10000.0, 1e-3, 1e12);
  if (c.use_rope) {
    require_null(json, "rope_scaling");
    require_null(json, "rope_parameters");
    if (c.rope % 2 != 0) json.refuse("qk_rope_head_dim", "an even number, for the rotation");
  }
  json.ignore({"rope_scaling", "rope_parameters"});
  c.latent_norm_eps = compat.latent_norm_fixed_eps ? 1e-6 : norm_eps;
  return c;
}

MoeConfig read_moe(const io::JsonReader& json, const Compatibility& compat) {
  MoeConfig c;
  c.experts = integer_or(json, {"num_experts", "num_local_experts"}, 0, 0, 1 << 16);
  c.biased_weights = compat.biased_router_weights;
  if (c.experts == 0) {
    json.ignore({"num_experts_per_token", "num_experts_per_tok", "num_shared_experts", "n_shared_experts",
                 "moe_intermediate_size", "num_expert_group", "n_group", "topk_group", "moe_renormalize",
                 "norm_topk_prob", "moe_router_activation_func", "routed_scaling_factor",
                 "use_grouped_topk"});
    return c;
  }
  c.top_k = integer(json, {"num_experts_per_token", "num_experts_per_tok"}, 1, c.experts);
  c.shared = integer_or(json, {"num_shared_experts", "n_shared_experts"}, 0, 0, 1024);
  c.width = json.integer("moe_intermediate_size", 1, kMaxDimension);
  c.renormalize = json.boolean_or(present_key(json, {"moe_renormalize", "norm_topk_prob"}), true);
  // Required: configuration classes disagree about its default (1.0 in Moonshot's, 2.446 in transformers').
  c.scale = json.number("routed_scaling_factor", -1e6, 1e6);
  if (json.has("moe_router_activation_func")) {
    c.sigmoid_router = json.choice("moe_router_activation_func", {"sigmoid", "softmax"}) == "sigmoid";
  }
  json.ignore({"moe_router_activation_func"});
  const bool grouped = json.boolean_or("use_grouped_topk", true);
  c.groups = integer_or(json, {"num_expert_group", "n_group"}, 1, 1, c.experts);
  c.groups_kept = json.integer_or("topk_group", 1, 1, c.groups);
  if (!grouped) c.groups = c.groups_kept = 1;
  return c;
}

std::vector<bool> sparse_layers(const io::JsonReader& json, int64_t layers, int64_t experts) {
  const int64_t first =
      json.integer_or("first_k_dense_replace", json.has("mlp_layer_types") ? 0 : 1, 0, layers);
  const int64_t every = json.integer_or("moe_layer_freq", 1, 1, kMaxLayers);
  std::vector<bool> sparse(static_cast<size_t>(layers));
  for (int64_t i = 0; i < layers; ++i)
    sparse[static_cast<size_t>(i)] = experts > 0 && i >= first && i % every == 0;
  if (json.has("mlp_layer_types")) {
    const auto names = json.strings("mlp_layer_types");
    check(static_cast<int64_t>(names.size()) == layers,
          "{}: key 'mlp_layer_types': found {} entries, expected {}", json.file(), names.size(), layers);
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] != "sparse" && names[i] != "dense")
        json.refuse("mlp_layer_types", "'dense' or 'sparse' for every layer");
      sparse[i] = names[i] == "sparse" && experts > 0;
    }
  }
  return sparse;
}

std::vector<int64_t> id_list(const io::JsonReader& json, std::string_view key, int64_t vocab) {
  if (!json.has(key)) {
    json.ignore({key});
    return {};
  }
  if (json.value(key).is_array()) return json.integers(key, 0, vocab - 1);
  return {json.integer(key, 0, vocab - 1)};
}

// Keys of transformers' base class and of training that do not change what a loaded model computes.
void ignore_harmless(const io::JsonReader& json) {
  json.ignore({"auto_map",
               "dtype",
               "torch_dtype",
               "transformers_version",
               "_name_or_path",
               "use_cache",
               "initializer_range",
               "attention_dropout",
               "pretraining_tp",
               "head_dim",
               "output_attentions",
               "output_hidden_states",
               "return_dict",
               "chunk_size_feed_forward",
               "is_encoder_decoder",
               "id2label",
               "label2id",
               "problem_type",
               "tokenizer_class",
               "_attn_implementation",
               "aux_loss_alpha",
               "seq_aux",
               "router_aux_loss_coef",
               "output_router_logits",
               "ep_size",
               "qk_head_dim",
               "torchscript"});
}

}  // namespace

int64_t Config::count(LayerKind kind) const { return std::count(layers.begin(), layers.end(), kind); }

double Config::least_parameters() const {
  const auto h = static_cast<double>(hidden);
  const auto sparse_layers = static_cast<double>(std::count(sparse.begin(), sparse.end(), true));
  return h * static_cast<double>(vocab_size) + h * static_cast<double>(layer_count()) +
         sparse_layers * static_cast<double>(moe.experts) * 3 * h * static_cast<double>(moe.width);
}

const Compatibility& compatibility(const std::string& name) {
  static const std::array<Compatibility, 3> kKnown{{
      {"transformers", false, true,
       "transformers (native class): router weights without the correction bias, kv_a_layernorm eps 1e-6"},
      {"remote-code", true, true,
       "remote-code (modeling_kimi.py): router weights with the correction bias, kv_a_layernorm eps 1e-6"},
      {"vllm", false, false,
       "vllm (also llama.cpp, mlx-lm): router weights without the correction bias, kv_a_layernorm eps as "
       "rms_norm_eps"},
  }};
  for (const auto& known : kKnown) {
    if (known.name == name) return known;
  }
  fail("compatibility: found '{}', expected transformers, remote-code or vllm", name);
}

Config read_config(const io::JsonReader& json, const Compatibility& compat) {
  Config c;
  if (json.has("architectures")) {
    const auto names = json.strings("architectures");
    c.architecture = names.empty() ? "" : names.front();
    check(c.architecture == "KimiLinearForCausalLM",
          "{}: key 'architectures': found \"{}\", expected \"KimiLinearForCausalLM\"", json.file(),
          io::printable(c.architecture));
  } else {
    if (json.string("model_type") != "kimi_linear") json.refuse("model_type", "\"kimi_linear\"");
    c.architecture = "KimiLinearForCausalLM";
  }
  if (json.string_or("model_type", "kimi_linear") != "kimi_linear")
    json.refuse("model_type", "\"kimi_linear\"");
  ignore_harmless(json);
  c.vocab_size = json.integer("vocab_size", 1, kMaxDimension);
  c.hidden = json.integer("hidden_size", 1, kMaxDimension);
  const int64_t layers = json.integer("num_hidden_layers", 1, kMaxLayers);
  c.norm_eps = json.number("rms_norm_eps", 0.0, 1.0);
  c.tied_head = json.boolean_or("tie_word_embeddings", false);
  c.max_length =
      integer_or(json, {"model_max_length", "max_position_embeddings"}, 1 << 20, 1, int64_t{1} << 31);
  if (json.string_or("hidden_act", "silu") != "silu") json.refuse("hidden_act", "\"silu\"");
  require_false(json, "attention_bias");
  require_null(json, "quantization_config");
  if (json.integer_or("num_nextn_predict_layers", 0, 0, kMaxLayers) != 0) {
    json.refuse("num_nextn_predict_layers", "0 (Kilin does not compute multi-token prediction)");
  }
  const auto section = json.optional_object("linear_attn_config");
  c.layers = layer_kinds(json, section, layers);
  const bool has_linear = c.count(LayerKind::kMla) < layers;
  if (has_linear) c.linear = read_linear(json, section);
  if (!has_linear && section) section->ignore({"num_heads", "head_dim", "short_conv_kernel_size"});
  if (!has_linear) json.ignore({"linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"});
  c.mla = read_mla(json, compat, c.norm_eps);
  c.moe = read_moe(json, compat);
  c.sparse = sparse_layers(json, layers, c.moe.experts);
  c.dense_width = json.integer_or("intermediate_size", 0, 0, kMaxDimension);
  c.eos_ids = id_list(json, "eos_token_id", c.vocab_size);
  const auto bos = id_list(json, "bos_token_id", c.vocab_size);
  if (!bos.empty()) c.bos_id = bos.front();
  id_list(json, "pad_token_id", c.vocab_size);  // checked; inference pads nothing
  c.compatibility = compat.name;
  const auto unread = json.unread_keys();
  check(unread.empty(), "{}: key '{}' is unknown and may change what the model computes", json.file(),
        unread.empty() ? "" : unread.front());
  check_config(c, json.file());
  return c;
}

Config read_config_file(const std::string& path, const std::string& compat_name) {
  const Compatibility& compat = compatibility(compat_name);
  return read_config(io::JsonReader::open(path), compat);
}

}  // namespace kilin
