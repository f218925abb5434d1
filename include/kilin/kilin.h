// SPDX-License-Identifier: Apache-2.0
// Kilin's public C++ API: load a Kimi Linear checkpoint, feed tokens, read logits, sample, and copy or save
// the state of a sequence. Needs only the standard library; link kilin::kilin.
//
//   auto model = kilin::Model::load("models/kilin-docs-10m");
//   auto sequence = model.new_sequence();
//   sequence.prefill(model.encode("The Linux kernel"));
//   kilin::Sampler sampler({.temperature = 0.7, .seed = 1});
//   int32_t next = sampler.sample(sequence.logits());
//
// Errors: every function throws an exception derived from std::runtime_error whose what() is one clear line
// for bad files and bad arguments. Objects of one model may be used from several threads; calls that compute
// take turns.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kilin {

// A LoRA adapter as PEFT writes it (adapter_config.json, adapter_model.safetensors) and a factor on its
// effect.
struct LoraSource {
  std::string directory;
  double scale = 1.0;
};

struct ModelOptions {
  int threads = 0;  // 0: the physical cores
  // Which implementation to agree with where implementations differ (docs/decisions/compatibility.md):
  // "transformers" (the native class), "remote-code" (Moonshot's modeling_kimi.py) or "vllm".
  std::string compatibility = "transformers";
  // What a position of an MLA layer is kept in: "f16" takes half the memory and the time of reading it, "f32"
  // is exact and takes any value (float16 ends at 65,504: beyond it prefill and decode throw). "bf16": as
  // rounded latent attention reads it, faster; only where that is rounded (activations). "auto": "bf16"
  // there, else "f16".
  std::string cache_type = "auto";
  // "rounded": where this machine is faster at it (AVX-512 without AMX), products round their activations to
  // 8-bit integers with quantised weights, as llama.cpp has them everywhere, those of 17 tokens and more to
  // bfloat16 with BF16 weights, and latent attention is bfloat16. "exact": nowhere, so that prefill and
  // decode agree to the rounding of float32. "auto": rounded if a matrix is quantised, else exact.
  std::string activations = "auto";
  // Bind each thread to a physical core, the one that loads the model too (until the model is gone).
  bool pin_threads = false;
  int64_t prefill_chunk = 2048;  // tokens computed at once in prefill: bounds the memory of activations
  bool check_finite =
      true;  // stop with an error when logits are NaN or infinite, naming the weights to blame
  bool require_tokenizer = true;  // false: token ids only (encode, decode and chat_prompt throw)
  // Added to the weights at load, in this order. Matrices that one changes are computed with as float32.
  std::vector<LoraSource> lora = {};  // designated initialisers may leave it out without a warning
};

struct ModelInfo {
  std::string path;
  std::string architecture;
  std::string compatibility;  // the choices made where implementations differ, one line
  int64_t layers = 0;
  int64_t kda_layers = 0;
  int64_t gdn_layers = 0;
  int64_t mla_layers = 0;
  int64_t moe_layers = 0;
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t max_length = 0;         // tokens of a sequence, from config.json
  int64_t parameters = 0;         // all
  int64_t active_parameters = 0;  // that a token uses, without the embedding table
  int64_t weight_bytes = 0;       // as stored and mapped
  int64_t active_weight_bytes =
      0;  // that a token reads in decode (chosen experts, head; not the embedding table)
  std::string
      activations;  // "rounded" or "exact": what ModelOptions::activations comes to, here with this model
  int64_t state_bytes_per_sequence = 0;  // KDA/GDN states and convolution states: constant in length
  int64_t cache_bytes_per_token = 0;     // MLA latents of all MLA layers, in the cache's type
  std::vector<std::pair<std::string, std::string>>
      details;  // further facts by name, in order, for `kilin info`
};

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

struct SamplingOptions {
  double temperature = 0.0;         // 0: greedy
  int top_k = 0;                    // 0: all
  double top_p = 1.0;               // nucleus; 1: all
  double min_p = 0.0;               // relative to the most likely token; 0: all
  double repetition_penalty = 1.0;  // divides positive and multiplies negative logits of tokens seen; 1: none
  uint64_t seed = 0;                // the same seed gives the same tokens
};

// Chooses tokens from logits: penalty, temperature, top-k, top-p, min-p, then one draw. Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options = {});  // throws for values out of range
  ~Sampler();
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  // A token counts as seen for the repetition penalty once it was accepted (prompt tokens too, if you wish).
  void accept(int32_t token);
  int32_t sample(std::span<const float> logits);  // [vocabulary]

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class Model;

// One text in progress: the states of all KDA layers and the latents of all MLA layers. Movable; copies are
// explicit.
class Sequence {
 public:
  Sequence(Sequence&&) noexcept;
  Sequence& operator=(Sequence&&) noexcept;
  ~Sequence();

  // Appends tokens and leaves the logits after the last one in logits(). An empty span changes nothing.
  // Throws, with the sequence unchanged, for an id outside the vocabulary or a length above the model's
  // limit. `progress`, if given, hears the number of tokens done after each chunk and stops the prefill
  // (sequence kept as far as it came) by returning false. Returns the number of tokens appended.
  int64_t prefill(std::span<const int32_t> tokens, const std::function<bool(int64_t done)>& progress = {});
  // Appends one token: prefill of one, by the path made for it.
  void decode(int32_t token);
  // Logits after the last token, [vocabulary]; empty for a sequence without tokens. Valid until the next
  // call.
  std::span<const float> logits() const;
  // Like prefill, but returns the logits after every one of these tokens, [tokens.size()][vocabulary].
  std::vector<float> prefill_all_logits(std::span<const int32_t> tokens);

  int64_t length() const;  // tokens so far
  int64_t bytes() const;   // memory of the state now
  Sequence copy()
      const;     // an independent sequence with the same past (shares full cache pages until written)
  void clear();  // back to no tokens

  // The whole state as bytes and back. restore() takes only bytes of a checkpoint made with a model of the
  // same shape, and throws otherwise with the sequence unchanged.
  std::vector<std::byte> checkpoint() const;
  void restore(std::span<const std::byte> bytes);

 private:
  friend class Model;
  struct Impl;
  explicit Sequence(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct GenerateOptions {
  int64_t max_tokens = 128;
  SamplingOptions sampling;
  std::vector<int32_t> seen;      // tokens besides the prompt's that count as seen for the repetition penalty
  std::vector<std::string> stop;  // generation ends before any of these texts
  bool ignore_end_tokens = false;  // go on after end-of-text tokens (benchmarks, golden tests)
  // Hears each token as soon as it is chosen, whether it makes text or not; return false to end.
  std::function<bool(int32_t id)> on_token;
  // Hears each piece of finished text (whole characters, nothing of a stop text); return false to end.
  std::function<bool(std::string_view text)> on_text;
  // Hears the number of prompt tokens done; return false to end.
  std::function<bool(int64_t done)> on_prefill;
};

struct GenerateResult {
  std::vector<int32_t> ids;   // generated tokens, the end token included
  std::string text;           // without special tokens and without the stop text
  std::string finish_reason;  // "stop" (end token or stop text), "length", "cancelled"
  int64_t prompt_tokens = 0;
  int64_t prefilled_tokens = 0;  // of them computed: fewer after a cancelled prefill
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

// A loaded checkpoint. Cheap to copy: copies share the weights.
class Model {
 public:
  // path: a Hugging Face directory of KimiLinearForCausalLM (config.json, safetensors, tokenizer), or a GGUF
  // file of architecture kimi-linear (of a split one the first part).
  static Model load(const std::string& path, const ModelOptions& options = {});
  // Random weights (stored as bfloat16) for the shape in a config.json: for measuring speed, not for text.
  static Model random(const std::string& config_path, uint64_t seed, const ModelOptions& options = {});

  const ModelInfo& info() const;
  Sequence new_sequence() const;
  // One token for each of several sequences of this model, computed as one batch; logits() of each
  // afterwards.
  void decode(std::span<Sequence* const> sequences, std::span<const int32_t> tokens) const;

  bool has_tokenizer() const;
  bool has_chat_template() const;
  std::vector<int32_t> encode(std::string_view text) const;  // special tokens in the text are recognised
  std::string decode_text(std::span<const int32_t> ids, bool skip_special = true) const;
  std::string chat_prompt(std::span<const ChatMessage> messages) const;  // with the opening of the answer
  const std::vector<int32_t>& end_ids()
      const;               // tokens that end a text (config, generation config, tokenizer)
  int32_t bos_id() const;  // -1: none
  int32_t eos_id() const;  // -1: none; what ends a document in training streams

  // Feeds the prompt to `sequence` (which may hold a past) and generates. Afterwards the sequence holds the
  // prompt and all generated tokens but the last, whose logits nobody asked for: prefill it to go on.
  GenerateResult generate(Sequence& sequence, std::span<const int32_t> prompt,
                          const GenerateOptions& options) const;

 private:
  friend class Sequence;
  struct Impl;
  explicit Model(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace kilin
