// SPDX-License-Identifier: Apache-2.0
// The shape of a model of the Kimi Linear family, read from a Hugging Face config.json. Layers count from 0
// here; the lists in config.json count from 1.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "io/json.h"

namespace kilin {

enum class LayerKind { kKda, kGdn, kMla };
enum class OutputGate { kNone, kSigmoid, kSilu };

// KDA and GDN layers (key 'linear_attn_config').
struct LinearAttentionConfig {
  int64_t heads = 0;                       // query and key heads
  int64_t value_heads = 0;                 // a multiple of heads; Kimi Linear: the same
  int64_t key_dim = 0;                     // per head
  int64_t value_dim = 0;                   // per head
  int64_t conv_taps = 4;                   // 1: no convolution (SiLU alone stays)
  std::optional<double> gate_lower_bound;  // bounded gate (Kimi K3); none: softplus gate
  OutputGate output_gate = OutputGate::kSigmoid;

  bool operator==(const LinearAttentionConfig&) const = default;
};

struct MlaConfig {
  int64_t heads = 0;
  int64_t nope = 0;    // query/key width per head without rotation
  int64_t rope = 0;    // width of the key part that all heads share, rotated only if use_rope
  int64_t value = 0;   // per head
  int64_t latent = 0;  // kv_lora_rank
  bool use_rope = false;
  double rope_theta = 10000.0;
  double latent_norm_eps = 1e-6;  // a quirk: see Compatibility

  bool operator==(const MlaConfig&) const = default;
};

struct MoeConfig {
  int64_t experts = 0;
  int64_t top_k = 0;
  int64_t shared = 0;  // shared experts, computed as one MLP of shared * width
  int64_t width = 0;
  int64_t groups = 1;
  int64_t groups_kept = 1;
  bool renormalize = true;
  bool sigmoid_router = true;  // else softmax
  double scale = 1.0;
  bool biased_weights = false;  // a quirk: see Compatibility

  bool operator==(const MoeConfig&) const = default;
};

struct Config {
  std::string architecture;
  int64_t vocab_size = 0;
  int64_t hidden = 0;
  int64_t dense_width = 0;
  double norm_eps = 1e-5;
  bool tied_head = false;
  int64_t max_length = 0;
  LinearAttentionConfig linear;
  MlaConfig mla;
  MoeConfig moe;
  std::vector<LayerKind> layers;
  std::vector<bool> sparse;  // [layers]: mixture of experts instead of a dense MLP
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;
  std::string compatibility;

  bool operator==(const Config&) const = default;
  int64_t layer_count() const { return static_cast<int64_t>(layers.size()); }
  int64_t count(LayerKind kind) const;
  // Fewer than the model has: embedding, one norm a layer, routed experts. Tells a hostile configuration from
  // a real one before memory is taken for it.
  double least_parameters() const;
};

// Where implementations of the same checkpoint differ, and which side is taken: the only place that decides.
struct Compatibility {
  std::string name;
  bool biased_router_weights;  // router weights gathered from score + correction bias instead of the score
  bool latent_norm_fixed_eps;  // kv_a_layernorm with eps 1e-6 instead of the config's rms_norm_eps
  std::string summary;         // one line for `kilin info`
};
// "transformers" (native class, the default), "remote-code" (Moonshot's modeling_kimi.py), "vllm" (also
// llama.cpp and mlx-lm). Throws Error for other names.
const Compatibility& compatibility(const std::string& name);

// Reads and checks config.json: every key that is there is either used, known not to matter, or an Error; so
// is a value that Kilin does not compute. Accepts Moonshot's keys and those that transformers' own class
// writes.
Config read_config(const io::JsonReader& json, const Compatibility& compat);
Config read_config_file(const std::string& path, const std::string& compat_name);

// Throws Error, naming `file`, if the parts of the configuration do not fit each other.
void check_config(const Config& config, const std::string& file);

}  // namespace kilin
