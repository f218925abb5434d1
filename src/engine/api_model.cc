// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/api_impl.h"
#include "engine/facts.h"
#include "io/json.h"
#include "model/gguf_config.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

void add_end_id(std::vector<int32_t>& ids, int64_t id, int64_t vocab) {
  if (id < vocab && std::find(ids.begin(), ids.end(), id) == ids.end())
    ids.push_back(static_cast<int32_t>(id));
}

std::vector<int64_t> end_ids_of(const io::JsonReader& generation, int64_t vocab) {
  if (!generation.has("eos_token_id")) return {};
  if (generation.value("eos_token_id").is_array()) return generation.integers("eos_token_id", 0, vocab - 1);
  return {generation.integer("eos_token_id", 0, vocab - 1)};
}

// Of generation_config.json.
std::vector<int64_t> generation_end_ids(const fs::path& directory, int64_t vocab) {
  const fs::path file = directory / "generation_config.json";
  if (!fs::exists(file)) return {};
  return end_ids_of(io::JsonReader::open(file.string()), vocab);
}

// Of a GGUF file: that of the document, of a turn and of a message, and what a generation_config.json said.
std::vector<int64_t> generation_end_ids(const io::GgufFile& file, int64_t vocab) {
  std::vector<int64_t> ids;
  for (const char* name : {"eos", "eot", "eom"}) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    if (!file.has(key)) continue;
    const int64_t id = file.get_int(key);
    check(id >= 0 && id < vocab, "{}: key '{}': found {}, expected 0 to {}", file.path(), key, id, vocab - 1);
    ids.push_back(id);
  }
  if (file.has(kGgufGenerationConfigKey)) {
    const std::string name = fmt::format("{}: key '{}'", file.path(), kGgufGenerationConfigKey);
    const io::JsonReader json(io::parse_json(file.get_string(kGgufGenerationConfigKey), name), name);
    for (const int64_t id : end_ids_of(json, vocab)) ids.push_back(id);
  }
  return ids;
}

// Tokens that end a text: those of config.json and generation_config.json, the tokenizer's end of document,
// and the chat format's end of turn (Moonshot's files name one in one place and another in the other).
std::vector<int32_t> find_end_ids(const Config& config, const std::vector<int64_t>& generation,
                                  const std::optional<text::Tokenizer>& tokenizer) {
  std::vector<int32_t> ids;
  for (int64_t id : config.eos_ids) add_end_id(ids, id, config.vocab_size);
  for (int64_t id : generation) add_end_id(ids, id, config.vocab_size);
  if (!tokenizer) return ids;
  if (tokenizer->eos_id()) add_end_id(ids, *tokenizer->eos_id(), config.vocab_size);
  for (const char* name : {"<|im_end|>", "[EOT]"}) {
    if (const auto id = tokenizer->token_to_id(name)) add_end_id(ids, *id, config.vocab_size);
  }
  return ids;
}

std::optional<Activations> activations_of(std::string_view name) {
  if (name == "auto") return std::nullopt;
  if (name == "exact") return Activations::kExact;
  if (name == "rounded") return Activations::kRounded;
  fail("activations: found '{}', expected auto, exact or rounded", name);
}

std::optional<Dtype> cache_type_of(std::string_view name) {
  if (name == "auto") return std::nullopt;
  if (name == "f16") return Dtype::kF16;
  if (name == "bf16") return Dtype::kBF16;
  if (name == "f32") return Dtype::kF32;
  fail("cache type: found '{}', expected auto, f16, bf16 or f32", name);
}

EngineOptions engine_options(const ModelOptions& options) {
  check(options.threads >= 0 && options.threads <= 1024, "threads: found {}, expected 0 (all cores) to 1024",
        options.threads);
  return {options.threads, cache_type_of(options.cache_type), options.pin_threads,
          activations_of(options.activations)};
}

}  // namespace

Model::Impl::Impl(LoadedModel loaded, const ModelOptions& model_options)
    : options(model_options), engine(std::move(loaded), engine_options(model_options)) {
  check(options.prefill_chunk >= 1 && options.prefill_chunk <= 1 << 20,
        "prefill chunk: found {}, expected 1 to 1048576 tokens", options.prefill_chunk);
  engine.set_check_finite(options.check_finite);
}

const text::Tokenizer& Model::Impl::need_tokenizer() const {
  check(tokenizer.has_value(), "{}: the model was loaded without a tokenizer", info.path);
  return *tokenizer;
}

void Model::Impl::check_tokens(std::span<const int32_t> tokens, int64_t past) const {
  const Config& c = engine.config();
  for (size_t i = 0; i < tokens.size(); ++i) {
    check(tokens[i] >= 0 && tokens[i] < c.vocab_size, "token {} of {}: found id {}, expected 0 to {}", i + 1,
          tokens.size(), tokens[i], c.vocab_size - 1);
  }
  check(past + static_cast<int64_t>(tokens.size()) <= c.max_length,
        "sequence of {} tokens is longer than the model's limit of {} (model_max_length in config.json)",
        past + static_cast<int64_t>(tokens.size()), c.max_length);
}

Model::Model(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

namespace {

// What a model's files say beside the weights.
struct Source {
  Config config;
  std::vector<int64_t> generation_end_ids;
  std::optional<text::Tokenizer> tokenizer;
  std::optional<text::ChatTemplate> chat_template;
};

Source read_directory(const fs::path& directory, const ModelOptions& options) {
  check(fs::exists(directory / "config.json"),
        "{}: has no config.json, expected a Hugging Face model directory or a GGUF file", directory.string());
  Source source{read_config_file((directory / "config.json").string(), options.compatibility), {}, {}, {}};
  if (options.require_tokenizer) {
    source.tokenizer = text::Tokenizer::load(directory);
    source.chat_template = text::ChatTemplate::load(directory);
  }
  source.generation_end_ids = generation_end_ids(directory, source.config.vocab_size);
  return source;
}

Source read_gguf(const io::GgufFile& file, const ModelOptions& options) {
  Source source{read_gguf_config(file, compatibility(options.compatibility)), {}, {}, {}};
  if (options.require_tokenizer) {
    source.tokenizer = text::Tokenizer::from_gguf(file);
    source.chat_template = text::ChatTemplate::from_gguf(file, *source.tokenizer);
  }
  source.generation_end_ids = generation_end_ids(file, source.config.vocab_size);
  return source;
}

}  // namespace

Model Model::load(const std::string& path, const ModelOptions& options) {
  check(fs::exists(path), "{}: no such file or directory", path);
  const bool directory = fs::is_directory(path);
  check(directory || io::GgufFile::is_gguf(path),
        "{}: is a file but no GGUF file, expected one or a Hugging Face model directory (config.json, "
        "*.safetensors, tokenizer)",
        path);
  // The configuration before the weights: a directory without it is no model at all.
  std::optional<Source> source;
  if (directory) source = read_directory(path, options);
  io::Checkpoint checkpoint = io::Checkpoint::open(path);
  if (!source) source = read_gguf(*checkpoint.gguf(), options);
  auto impl = std::make_shared<Impl>(LoadedModel::load(std::move(source->config), std::move(checkpoint),
                                                       engine_options(options).threads, options.lora),
                                     options);
  impl->tokenizer = std::move(source->tokenizer);
  impl->chat_template = std::move(source->chat_template);
  impl->end_ids = find_end_ids(impl->engine.config(), source->generation_end_ids, impl->tokenizer);
  impl->info = model_facts(impl->engine, path);
  return Model(std::move(impl));
}

Model Model::random(const std::string& config_path, uint64_t seed, const ModelOptions& options) {
  check(options.lora.empty(), "{}: random weights take no LoRA adapter", config_path);
  Config config = read_config_file(config_path, options.compatibility);
  auto impl = std::make_shared<Impl>(
      LoadedModel::random(std::move(config), seed, StoredValues::kDrop, engine_options(options).threads),
      options);
  impl->end_ids = find_end_ids(impl->engine.config(), {}, impl->tokenizer);
  impl->info = model_facts(impl->engine, config_path + " (random weights)");
  return Model(std::move(impl));
}

const ModelInfo& Model::info() const { return impl_->info; }
bool Model::has_tokenizer() const { return impl_->tokenizer.has_value(); }
bool Model::has_chat_template() const { return impl_->chat_template.has_value(); }
const std::vector<int32_t>& Model::end_ids() const { return impl_->end_ids; }

std::vector<int32_t> Model::encode(std::string_view text) const {
  return impl_->need_tokenizer().encode(text);
}

std::string Model::decode_text(std::span<const int32_t> ids, bool skip_special) const {
  return impl_->need_tokenizer().decode(ids, skip_special);
}

std::string Model::chat_prompt(std::span<const ChatMessage> messages) const {
  check(impl_->chat_template.has_value(),
        "{}: has no chat template (chat_template.jinja or tokenizer_config.json)", impl_->info.path);
  std::vector<text::ChatMessage> list;
  for (const ChatMessage& m : messages) list.push_back({m.role, m.content});
  return impl_->chat_template->render(list, true);
}

int32_t Model::bos_id() const {
  const Config& c = impl_->engine.config();
  if (impl_->tokenizer && impl_->tokenizer->bos_id()) return *impl_->tokenizer->bos_id();
  return static_cast<int32_t>(c.bos_id.value_or(-1));
}

int32_t Model::eos_id() const {
  const Config& c = impl_->engine.config();
  if (impl_->tokenizer && impl_->tokenizer->eos_id()) return *impl_->tokenizer->eos_id();
  return c.eos_ids.empty() ? -1 : static_cast<int32_t>(c.eos_ids.front());
}

void Model::decode(std::span<Sequence* const> sequences, std::span<const int32_t> tokens) const {
  check(sequences.size() == tokens.size(), "decode: found {} tokens for {} sequences", tokens.size(),
        sequences.size());
  std::vector<int32_t> cu_seqlens{0}, slots, wanted;
  std::vector<int64_t> past;
  std::vector<Sequence::Impl*> moved;
  std::lock_guard lock(impl_->mutex);
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence::Impl& s = *sequences[i]->impl_;
    check(s.model == impl_, "decode: sequence {} belongs to another model", i + 1);
    check(std::find(slots.begin(), slots.end(), s.slot) == slots.end(), "decode: sequence {} is named twice",
          i + 1);
    impl_->check_tokens(tokens.subspan(i, 1), s.length);
    cu_seqlens.push_back(static_cast<int32_t>(i + 1));
    slots.push_back(s.slot);
    past.push_back(s.length);
    wanted.push_back(static_cast<int32_t>(i));
    moved.push_back(&s);
  }
  if (moved.empty()) return;
  const auto logits = Sequence::Impl::forward({tokens, cu_seqlens, slots, past, wanted}, moved);
  const auto vocab = static_cast<size_t>(impl_->info.vocab_size);
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence::Impl& s = *sequences[i]->impl_;
    const auto row = logits.subspan(i * vocab, vocab);
    s.logits.assign(row.begin(), row.end());
    ++s.length;
  }
}

}  // namespace kilin
