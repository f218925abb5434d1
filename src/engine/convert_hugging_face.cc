// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "engine/hugging_face_shards.h"
#include "io/mapped_file.h"
#include "model/gguf_config.h"
#include "text/chat_template.h"
#include "text/gguf_tokenizer.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

std::string generation_config(const io::GgufFile& file, const Config& config) {
  if (file.has(kGgufGenerationConfigKey)) return file.get_string(kGgufGenerationConfigKey);
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (config.bos_id) json["bos_token_id"] = *config.bos_id;
  if (!config.eos_ids.empty()) json["eos_token_id"] = config.eos_ids;
  return json.dump(2) + "\n";
}

void write_tokenizer(const io::GgufFile& file, io::OutputDirectory& out, ConvertReport& report) {
  if (file.get_string("tokenizer.ggml.model", "none") == "none") {
    report.notes.emplace_back("the file has no tokenizer, so the directory has none");
    return;
  }
  const auto chat = text::gguf_chat_template(file);
  const auto made = text::hugging_face_tokenizer(text::parse_gguf_tokenizer(file), chat);
  out.write("tokenizer.json", made.tokenizer_json);
  out.write("tokenizer_config.json", made.tokenizer_config_json);
  // One for tools beside it has its place in tokenizer_config.json only.
  if (chat && !chat->tools) out.write("chat_template.jinja", chat->text);
}

// What of a Hugging Face directory describes the model or its text, and code that its configuration may name.
void copy_text_files(const fs::path& directory, io::OutputDirectory& out) {
  std::vector<std::string> names{"generation_config.json",  "tokenizer.json", "tokenizer_config.json",
                                 "special_tokens_map.json", "tiktoken.model", "chat_template.jinja"};
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".py") || name.starts_with("LICENSE")) names.push_back(name);
  }
  for (const std::string& name : names) {
    if (!fs::exists(directory / name)) continue;
    out.write(name, io::MappedFile((directory / name).string()).text());
  }
}

void write_text_files(const ConvertSource& source, io::OutputDirectory& out, ConvertReport& report) {
  if (const io::GgufFile* gguf = source.checkpoint.gguf()) {
    write_tokenizer(*gguf, out, report);
    out.write("generation_config.json", generation_config(*gguf, source.config));
  } else {
    copy_text_files(source.checkpoint.path(), out);
  }
  out.write("config.json", source.config_text);  // last: without it the directory is no model
}

void check_type(const std::string& directory, WeightType type) {
  check(type == WeightType::kAuto || type == WeightType::kF32 || type == WeightType::kBF16,
        "{}: safetensors files hold no quantised weights, expected type auto, f32 or bf16", directory);
}

ConvertReport write_directory(const ConvertSource& source, const LoraSet& lora, const std::string& directory,
                              const ConvertOptions& options) {
  ConvertReport report;
  report.source_bytes = source.checkpoint.total_bytes();
  const Shards shards = divide_into_shards(source, options.type, lora, report);
  const bool quantized = std::any_of(source.dtypes.begin(), source.dtypes.end(), is_quantized);
  if (quantized && options.type != WeightType::kF32) {
    report.notes.emplace_back("quantised weights were written as bfloat16: what they lost stays lost");
  }
  io::OutputDirectory out(directory, options.overwrite);
  check_space(fs::path(directory) / "config.json", report.target_bytes);
  if (!write_shards(source, options, shards, lora, report.target_bytes, out)) {
    report.cancelled = true;
    return report;
  }
  write_text_files(source, out, report);
  out.commit();
  return report;
}

}  // namespace

ConvertReport convert_to_hugging_face(const std::string& path, const std::string& directory,
                                      const ConvertOptions& options) {
  check_type(directory, options.type);
  const ConvertSource source = ConvertSource::open(path, options.compatibility);
  check(source.checkpoint.gguf() != nullptr, "{}: is no GGUF file", path);
  return write_directory(source, LoraSet(), directory, options);
}

ConvertReport merge_lora(const std::string& path, const LoraSource& adapter, const std::string& directory,
                         const ConvertOptions& options) {
  check_type(directory, options.type);
  const ConvertSource source = ConvertSource::open(path, options.compatibility);
  const LoraSet lora({&adapter, 1}, source.config);
  ConvertReport report = write_directory(source, lora, directory, options);
  report.notes.push_back(fmt::format("{} matrices changed by {} (rank {}, times {:.4g})", lora.changed(),
                                     adapter.directory, lora.adapters().front().rank(),
                                     lora.adapters().front().scale()));
  return report;
}

}  // namespace kilin
