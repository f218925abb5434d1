// SPDX-License-Identifier: Apache-2.0
#include "model/gguf_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "io/json.h"
#include "io/printable.h"

namespace kilin {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kArchitecture = "kimi-linear";
constexpr int64_t kMaxDimension = 1 << 24;
constexpr int64_t kMaxLayers = 4096;
enum Gating : int64_t { kSoftmax = 1, kSigmoid = 2 };  // llama.cpp's numbers

std::string key_of(std::string_view name) { return fmt::format("{}.{}", kArchitecture, name); }

// llama.cpp's keys that Kilin reads, checks, or knows not to matter: key_length is that of the absorbed form,
// value_length is junk in published files, and nothing is rotated (rope.*).
constexpr std::array kKnown{
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "ssm.conv_kernel",
    "kda.head_dim",
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "leading_dense_block_count",
};

class Keys {
 public:
  explicit Keys(const io::GgufFile& file) : file_(file) {}

  bool has(std::string_view name) const { return file_.has(key_of(name)); }

  int64_t integer(std::string_view name, int64_t low, int64_t high) const {
    return in_range(name, file_.get_int(key_of(name)), low, high);
  }
  int64_t integer_or(std::string_view name, int64_t fallback, int64_t low, int64_t high) const {
    return in_range(name, file_.get_int(key_of(name), fallback), low, high);
  }

  // Floats are stored with 32 bits: the shortest decimal number that reads back the same is what config.json
  // said.
  double number(std::string_view name) const { return shortest(file_.get_double(key_of(name))); }
  double number_or(std::string_view name, double fallback) const {
    return has(name) ? number(name) : fallback;
  }

  [[noreturn]] void refuse(std::string_view name, const std::string& found,
                           const std::string& expected) const {
    fail("{}: key '{}': found {}, expected {}", file_.path(), key_of(name), found, expected);
  }

 private:
  int64_t in_range(std::string_view name, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) refuse(name, std::to_string(value), fmt::format("{} to {}", low, high));
    return value;
  }

  static double shortest(double value) {
    const std::string text = fmt::format("{}", static_cast<float>(value));
    double parsed = value;
    std::from_chars(text.data(), text.data() + text.size(), parsed);
    return parsed;
  }

  const io::GgufFile& file_;
};

void check_architecture(const io::GgufFile& file) {
  const std::string& found = file.get_string("general.architecture");
  check(found == kArchitecture, "{}: key 'general.architecture': found \"{}\", expected \"{}\"", file.path(),
        io::printable(found), kArchitecture);
}

void check_known_keys(const io::GgufFile& file) {
  const std::string prefix = key_of("");
  for (const auto& [key, value] : file.metadata()) {
    if (!key.starts_with(prefix)) continue;
    const std::string_view name = std::string_view(key).substr(prefix.size());
    const bool known = std::find(kKnown.begin(), kKnown.end(), name) != kKnown.end();
    check(known, "{}: key '{}' is unknown and may change what the model computes", file.path(),
          io::printable(key));
  }
}

// [layers]: whether a layer is MLA; of the others the number of key-value heads is 0.
std::vector<bool> full_attention(const io::GgufFile& file, const Keys& keys, int64_t layers) {
  const std::string key = key_of("attention.head_count_kv");
  const auto& counts = file.get_ints(key);
  if (static_cast<int64_t>(counts.size()) != layers) {
    keys.refuse("attention.head_count_kv", fmt::format("{} entries", counts.size()),
                fmt::format("{}, one a layer", layers));
  }
  std::vector<bool> full;
  for (const int64_t count : counts) {
    if (count < 0) keys.refuse("attention.head_count_kv", std::to_string(count), "0 or more");
    full.push_back(count > 0);
  }
  return full;
}

int64_t vocabulary_size(const io::GgufFile& file, const Keys& keys) {
  if (keys.has("vocab_size")) return keys.integer("vocab_size", 1, kMaxDimension);
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
  check(file.has(kTokens), "{}: neither key '{}' nor '{}' tells the size of the vocabulary", file.path(),
        key_of("vocab_size"), kTokens);
  return static_cast<int64_t>(file.get_strings(kTokens).size());
}

void add_attention(const io::GgufFile& file, const Keys& keys, int64_t layers, Json& json) {
  const int64_t heads = keys.integer("attention.head_count", 1, kMaxDimension);
  const int64_t rope = keys.integer("rope.dimension_count", 0, kMaxDimension);
  const int64_t key_length = keys.integer("attention.key_length_mla", 1, kMaxDimension);
  if (key_length <= rope) {
    keys.refuse("attention.key_length_mla", std::to_string(key_length),
                fmt::format("more than rope.dimension_count = {}", rope));
  }
  json["num_attention_heads"] = json["num_key_value_heads"] = heads;
  json["q_lora_rank"] = nullptr;
  json["kv_lora_rank"] = keys.integer("attention.kv_lora_rank", 1, kMaxDimension);
  json["qk_nope_head_dim"] = key_length - rope;
  json["qk_rope_head_dim"] = rope;
  json["v_head_dim"] = keys.integer("attention.value_length_mla", 1, kMaxDimension);
  json["mla_use_nope"] = true;
  json["rope_theta"] = keys.number_or("rope.freq_base", 10000.0);
  const std::vector<bool> full = full_attention(file, keys, layers);
  Json linear = {{"full_attn_layers", Json::array()}, {"kda_layers", Json::array()}};
  for (size_t i = 0; i < full.size(); ++i)
    linear[full[i] ? "full_attn_layers" : "kda_layers"].push_back(i + 1);
  if (!linear["kda_layers"].empty()) {
    linear["num_heads"] = heads;
    linear["head_dim"] = keys.integer("kda.head_dim", 1, 256);
    linear["short_conv_kernel_size"] = keys.integer("ssm.conv_kernel", 1, 8);
  }
  json["linear_attn_config"] = linear;
}

void add_experts(const Keys& keys, int64_t layers, Json& json) {
  const int64_t experts = keys.integer_or("expert_count", 0, 0, 1 << 16);
  const int64_t dense = keys.integer_or("leading_dense_block_count", 0, 0, layers);
  json["num_experts"] = experts;
  json["first_k_dense_replace"] = dense;
  json["moe_layer_freq"] = 1;
  if (experts == 0) return;
  json["num_experts_per_token"] = keys.integer("expert_used_count", 1, experts);
  json["num_shared_experts"] = keys.integer("expert_shared_count", 0, 1024);
  json["moe_intermediate_size"] = keys.integer("expert_feed_forward_length", 1, kMaxDimension);
  const double scale = keys.number_or("expert_weights_scale", 1.0);
  json["routed_scaling_factor"] = scale == 0 ? 1.0 : scale;  // llama.cpp: 0 is "no scale"
  json["moe_router_activation_func"] =
      keys.integer("expert_gating_func", kSoftmax, kSigmoid) == kSigmoid ? "sigmoid" : "softmax";
  json["num_expert_group"] = keys.integer_or("expert_group_count", 1, 1, experts);
  json["topk_group"] = keys.integer_or("expert_group_used_count", 1, 1, experts);
  json["use_grouped_topk"] = true;
}

void add_token_id(const io::GgufFile& file, const char* name, int64_t vocab, Json& json) {
  const std::string key = fmt::format("tokenizer.ggml.{}", name);
  if (!file.has(key)) return;
  const int64_t id = file.get_int(key);
  check(id >= 0 && id < vocab, "{}: key '{}': found {}, expected 0 to {}", file.path(), key, id, vocab - 1);
  json[name] = id;
}

Json config_from_keys(const io::GgufFile& file) {
  const Keys keys(file);
  const int64_t layers = keys.integer("block_count", 1, kMaxLayers);
  Json json = {{"architectures", {"KimiLinearForCausalLM"}}, {"model_type", "kimi_linear"}};
  const int64_t vocab = vocabulary_size(file, keys);
  json["vocab_size"] = vocab;
  json["hidden_size"] = keys.integer("embedding_length", 1, kMaxDimension);
  json["num_hidden_layers"] = layers;
  json["intermediate_size"] = keys.integer_or("feed_forward_length", 0, 0, kMaxDimension);
  json["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon");
  json["hidden_act"] = "silu";
  json["model_max_length"] = keys.integer_or("context_length", 1 << 20, 1, int64_t{1} << 31);
  json["tie_word_embeddings"] = false;
  add_attention(file, keys, layers, json);
  add_experts(keys, layers, json);
  if (json["num_experts"] != 0) {
    const std::string norm = key_of("expert_weights_norm");
    json["moe_renormalize"] = file.get_bool(norm, true);
  }
  add_token_id(file, "bos_token_id", vocab, json);
  add_token_id(file, "eos_token_id", vocab, json);
  return json;
}

// The key `kilin.config` and llama.cpp's keys describe one model.
void check_agreement(const io::GgufFile& file, const Config& c) {
  const Keys keys(file);
  const auto agree = [&](std::string_view name, int64_t expected) {
    const int64_t found = keys.integer(name, 0, int64_t{1} << 31);
    if (found != expected) {
      keys.refuse(name, std::to_string(found), fmt::format("{} as in key '{}'", expected, kGgufConfigKey));
    }
  };
  agree("block_count", c.layer_count());
  agree("embedding_length", c.hidden);
  agree("vocab_size", c.vocab_size);
  agree("attention.head_count", c.mla.heads);
  agree("attention.kv_lora_rank", c.mla.latent);
  agree("expert_count", c.moe.experts);
  const std::vector<bool> full = full_attention(file, keys, c.layer_count());
  for (size_t i = 0; i < full.size(); ++i) {
    if (full[i] != (c.layers[i] == LayerKind::kMla)) {
      keys.refuse("attention.head_count_kv",
                  fmt::format("{} attention in layer {}", full[i] ? "full" : "linear", i + 1),
                  fmt::format("what key '{}' says", kGgufConfigKey));
    }
  }
}

uint32_t u32(int64_t value) { return static_cast<uint32_t>(value); }

void write_experts(const Config& c, io::GgufWriter& w) {
  const auto leading = std::find(c.sparse.begin(), c.sparse.end(), true) - c.sparse.begin();
  w.add_uint32(key_of("expert_count"), u32(c.moe.experts));
  w.add_uint32(key_of("expert_used_count"), u32(c.moe.top_k));
  if (c.moe.groups > 1) w.add_uint32(key_of("expert_group_count"), u32(c.moe.groups));
  w.add_uint32(key_of("expert_group_used_count"), u32(c.moe.groups_kept));
  w.add_uint32(key_of("expert_gating_func"), u32(c.moe.sigmoid_router ? kSigmoid : kSoftmax));
  w.add_uint32(key_of("expert_feed_forward_length"), u32(c.moe.width));
  w.add_uint32(key_of("expert_shared_count"), u32(c.moe.shared));
  w.add_float32(key_of("expert_weights_scale"), static_cast<float>(c.moe.scale));
  if (!c.moe.renormalize) w.add_bool(key_of("expert_weights_norm"), false);
  w.add_uint32(key_of("leading_dense_block_count"), u32(leading));
}

// Dense layers behind the first sparse one.
bool dense_after_sparse(const Config& c) {
  const auto first = std::find(c.sparse.begin(), c.sparse.end(), true);
  return std::find(first, c.sparse.end(), false) != c.sparse.end();
}

}  // namespace

std::string gguf_config_text(const io::GgufFile& file) {
  check_architecture(file);
  if (file.has(kGgufConfigKey)) return file.get_string(kGgufConfigKey);
  check_known_keys(file);
  return config_from_keys(file).dump(2) + "\n";
}

Config read_gguf_config(const io::GgufFile& file, const Compatibility& compat) {
  const bool own = file.has(kGgufConfigKey);
  const std::string name = own ? fmt::format("{}: key '{}'", file.path(), kGgufConfigKey) : file.path();
  Config config = read_config(io::JsonReader(io::parse_json(gguf_config_text(file), name), name), compat);
  if (own) {
    check_known_keys(file);
    check_agreement(file, config);
  }
  return config;
}

void write_gguf_config(const Config& c, std::string_view config_text, io::GgufWriter& w) {
  w.add_string("general.architecture", kArchitecture);
  w.add_string("general.type", "model");
  w.add_uint32(key_of("block_count"), u32(c.layer_count()));
  w.add_uint32(key_of("context_length"), u32(c.max_length));
  w.add_uint32(key_of("embedding_length"), u32(c.hidden));
  w.add_uint32(key_of("feed_forward_length"), u32(c.dense_width));
  w.add_uint32(key_of("attention.head_count"), u32(c.mla.heads));
  std::vector<int32_t> kv_heads;
  for (const LayerKind kind : c.layers) kv_heads.push_back(kind == LayerKind::kMla ? 1 : 0);
  w.add_int32s(key_of("attention.head_count_kv"), kv_heads);
  w.add_float32(key_of("rope.freq_base"), static_cast<float>(c.mla.rope_theta));
  w.add_float32(key_of("attention.layer_norm_rms_epsilon"), static_cast<float>(c.norm_eps));
  w.add_uint32(key_of("attention.key_length"), u32(c.mla.latent + c.mla.rope));  // of a row of the cache
  w.add_uint32(key_of("attention.value_length"), u32(c.mla.value));
  w.add_uint32(key_of("vocab_size"), u32(c.vocab_size));
  w.add_uint32(key_of("ssm.conv_kernel"), u32(c.linear.conv_taps));
  w.add_uint32(key_of("kda.head_dim"), u32(c.linear.key_dim));
  w.add_uint32(key_of("attention.kv_lora_rank"), u32(c.mla.latent));
  w.add_uint32(key_of("rope.dimension_count"), u32(c.mla.rope));
  w.add_uint32(key_of("attention.key_length_mla"), u32(c.mla.nope + c.mla.rope));
  w.add_uint32(key_of("attention.value_length_mla"), u32(c.mla.value));
  write_experts(c, w);
  w.add_string(kGgufConfigKey, config_text);
}

std::vector<std::string> beyond_llama_cpp(const Config& c) {
  std::vector<std::string> found;
  const auto note = [&](bool beyond, const char* what) {
    if (beyond) found.emplace_back(what);
  };
  const LinearAttentionConfig& a = c.linear;
  const bool linear = c.count(LayerKind::kMla) < c.layer_count();
  note(c.count(LayerKind::kGdn) > 0, "GDN layers");
  note(linear && a.gate_lower_bound.has_value(), "a bounded forget gate");
  note(linear && a.conv_taps == 1, "no convolution");
  note(linear && a.output_gate != OutputGate::kSigmoid, "an output gate other than sigmoid");
  note(linear && (a.heads != c.mla.heads || a.value_heads != a.heads),
       "numbers of heads that differ between queries, values and full attention");
  note(linear && a.value_dim != a.key_dim, "value heads of another width than key heads");
  note(!linear, "no linear attention");
  note(c.count(LayerKind::kMla) == 0, "no full attention");
  note(c.mla.use_rope, "rotary positions");
  note(c.tied_head, "an output head tied to the embedding");
  note(dense_after_sparse(c), "dense layers among the sparse ones");
  note(c.moe.experts > 0 && c.moe.shared == 0, "no shared expert");
  note(c.moe.experts > 0 && !c.moe.renormalize, "router weights that are not normalised");
  return found;
}

}  // namespace kilin
