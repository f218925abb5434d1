// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "text/file.h"
#include "text/tokenizer_files.h"

namespace kilin::text {
namespace {

constexpr size_t kMaxTokenizerBytes = size_t{256} << 20;
constexpr size_t kMaxConfigBytes = size_t{32} << 20;

Json parse_config(std::string_view text, std::string_view name) {
  if (text.empty()) return {};
  try {
    Json config = parse_json(text);
    if (!config.is_object()) fail("{}, expected an object", shown(config));
    return config;
  } catch (const Error& error) {
    fail("{}: {}", name, error.what());
  }
}

// Runs `make`, with the file's name before the message of an Error.
template <class Make>
auto named_errors(const std::filesystem::path& path, const Make& make) {
  try {
    return make();
  } catch (const Error& error) {
    fail("{}: {}", path.string(), error.what());
  }
}

std::string read_config(const std::filesystem::path& path) {
  return std::filesystem::exists(path) ? read_file(path, kMaxConfigBytes) : std::string();
}

TokenizerParts parts_of_tokenizer_json(std::string_view json, std::string_view config) {
  TokenizerParts parts = parse_tokenizer_json(json);
  if (!config.empty()) read_named_tokens(parse_config(config, "tokenizer_config.json"), parts.named);
  return parts;
}

TokenizerParts parts_of_tiktoken(std::string_view ranks, std::string_view config) {
  const Json parsed = parse_config(config, "tokenizer_config.json");
  TokenizerParts parts = parse_tiktoken(ranks, parsed);
  if (!parsed.is_null()) read_named_tokens(parsed, parts.named);
  return parts;
}

// `finish` makes what is wanted out of the parts, within the naming of errors.
template <class Finish>
auto read_tokenizer_json(const std::filesystem::path& path, const Finish& finish) {
  const std::string json = read_file(path, kMaxTokenizerBytes);
  std::string config = read_config(path.parent_path() / "tokenizer_config.json");
  if (config.empty()) config = read_config(path.parent_path() / "special_tokens_map.json");
  return named_errors(path, [&] { return finish(parts_of_tokenizer_json(json, config)); });
}

template <class Finish>
auto read_tiktoken(const std::filesystem::path& path, const std::filesystem::path& tokenizer_config_path,
                   const Finish& finish) {
  const std::string ranks = read_file(path, kMaxTokenizerBytes);
  const std::string config =
      tokenizer_config_path.empty() ? std::string() : read_file(tokenizer_config_path, kMaxConfigBytes);
  return named_errors(path, [&] { return finish(parts_of_tiktoken(ranks, config)); });
}

template <class Finish>
auto read_directory(const std::filesystem::path& model_dir, const Finish& finish) {
  const auto json = model_dir / "tokenizer.json", ranks = model_dir / "tiktoken.model";
  if (std::filesystem::exists(json)) return read_tokenizer_json(json, finish);
  check(std::filesystem::exists(ranks), "{}: no tokenizer.json and no tiktoken.model", model_dir.string());
  const auto config = model_dir / "tokenizer_config.json";
  return read_tiktoken(ranks, std::filesystem::exists(config) ? config : std::filesystem::path(), finish);
}

Tokenizer tokenizer_of(TokenizerParts parts) { return Tokenizer(std::move(parts)); }

}  // namespace

Tokenizer Tokenizer::from_tokenizer_json(std::string_view json, std::string_view config) {
  return Tokenizer(parts_of_tokenizer_json(json, config));
}

Tokenizer Tokenizer::from_tiktoken(std::string_view ranks, std::string_view config) {
  return Tokenizer(parts_of_tiktoken(ranks, config));
}

Tokenizer Tokenizer::load_tokenizer_json(const std::filesystem::path& path) {
  return read_tokenizer_json(path, tokenizer_of);
}

Tokenizer Tokenizer::load_tiktoken(const std::filesystem::path& path,
                                   const std::filesystem::path& tokenizer_config_path) {
  return read_tiktoken(path, tokenizer_config_path, tokenizer_of);
}

Tokenizer Tokenizer::load(const std::filesystem::path& model_dir) {
  return read_directory(model_dir, tokenizer_of);
}

TokenizerParts Tokenizer::load_parts(const std::filesystem::path& model_dir) {
  return read_directory(model_dir, [](TokenizerParts parts) { return parts; });
}

}  // namespace kilin::text
