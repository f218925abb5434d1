// SPDX-License-Identifier: Apache-2.0
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "text/byte_characters.h"
#include "text/tokenizer_files.h"

namespace kilin::text {
namespace {

using IdOfToken = std::unordered_map<std::string_view, int32_t>;

// A key that must be absent, null, false, 0, "" or empty, because what it asks for is not implemented.
void reject(const Json& object, std::string_view where, const char* key) {
  const Json* value = find_field(object, where, key);
  const bool idle = value == nullptr || *value == false || *value == 0 ||
                    (value->is_string() && *value == "") || (value->is_structured() && value->empty());
  if (!idle) fail("{}.{} is {}, which is not supported", where, key, shown(*value));
}

std::vector<AddedToken> parse_added(const Json& root) {
  std::vector<AddedToken> added;
  if (find_field(root, "root", "added_tokens") == nullptr) return added;
  for (const Json& entry : array_field(root, "root", "added_tokens")) {
    const std::string where = fmt::format("added_tokens[{}]", added.size());
    check(find_field(entry, where, "id") != nullptr, "{}.id is missing", where);
    AddedToken token;
    token.id = to_id(entry["id"], where + ".id");
    token.content = string_field(entry, where, "content");
    token.special = bool_field(entry, where, "special", false);
    token.normalized = bool_field(entry, where, "normalized", !token.special);
    token.lstrip = bool_field(entry, where, "lstrip", false);
    token.rstrip = bool_field(entry, where, "rstrip", false);
    reject(entry, where, "single_word");
    added.push_back(std::move(token));
  }
  return added;
}

void check_added_id(const Json& vocab, const AddedToken& token) {
  const auto own = vocab.find(token.content);
  if (own == vocab.end()) return;
  if (*own != token.id) {
    fail("added_tokens: '{}' has id {}, but model.vocab has it as {}", token.content, token.id, shown(*own));
  }
}

// The bytes of every token; a token that is no byte-level text must be an added one, and has no bytes here.
std::vector<std::string> parse_vocab(const Json& vocab, const std::vector<AddedToken>& added) {
  const ByteCharacters& characters = ByteCharacters::get();
  std::unordered_map<int32_t, std::string_view> added_text;
  for (const AddedToken& token : added) {
    check_added_id(vocab, token);
    added_text.emplace(token.id, token.content);
  }
  std::vector<std::string> tokens;
  std::vector<bool> taken;
  for (const auto& [token, value] : vocab.items()) {
    const int32_t id = to_id(value, "model.vocab: an id");
    const auto index = static_cast<size_t>(id);
    if (index >= tokens.size()) {
      tokens.resize(index + 1);
      taken.resize(index + 1);
    }
    check(!taken[index], "model.vocab: id {} has two tokens, one is '{}'", id, token);
    taken[index] = true;
    if (characters.to_bytes(token, tokens[index])) continue;
    tokens[index].clear();
    const auto found = added_text.find(id);
    check(found != added_text.end() && found->second == token,
          "model.vocab: '{}' (id {}) is not in the byte-level alphabet", token, id);
  }
  return tokens;
}

// "a b" or ["a", "b"].
std::pair<std::string_view, std::string_view> split_merge(const Json& entry, size_t index) {
  // Views: the JSON outlives them.
  if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
    return {entry[0].get_ref<const std::string&>(), entry[1].get_ref<const std::string&>()};
  }
  if (!entry.is_string()) fail("model.merges[{}] is {}, expected two tokens", index, shown(entry));
  const std::string_view text = entry.get_ref<const std::string&>();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
    fail("model.merges[{}] is {}, expected two tokens with a space between", index, shown(entry));
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

std::vector<Merge> parse_merges(const Json& model) {
  IdOfToken ids;
  ids.reserve(model["vocab"].size());
  for (const auto& [token, id] : model["vocab"].items()) ids.emplace(token, id.get<int32_t>());
  const auto id_of = [&ids](std::string_view token, size_t index) {
    const auto found = ids.find(token);
    check(found != ids.end(), "model.merges[{}]: '{}' is not in model.vocab", index, token);
    return found->second;
  };
  std::vector<Merge> merges;
  for (const Json& entry : array_field(model, "model", "merges")) {
    const size_t index = merges.size();
    const auto [left, right] = split_merge(entry, index);
    const int32_t result = id_of(std::string(left) += right, index);
    merges.push_back({id_of(left, index), id_of(right, index), result, static_cast<int32_t>(index)});
  }
  return merges;
}

std::string escaped(std::string_view literal) {
  std::string pattern;
  for (const char c : literal) {
    if (c >= 0 && !std::isalnum(c) && c > ' ') pattern += '\\';
    pattern += c;
  }
  return pattern;
}

std::string parse_split(const Json& split, const std::string& where) {
  const std::string behavior = string_field(split, where, "behavior");
  check(behavior == "Isolated", "{}.behavior is '{}', only 'Isolated' is supported", where, behavior);
  reject(split, where, "invert");
  const Json& pattern = object_field(split, where, "pattern");
  if (find_field(pattern, where + ".pattern", "String") != nullptr) {
    return escaped(string_field(pattern, where + ".pattern", "String"));
  }
  return string_field(pattern, where + ".pattern", "Regex");
}

// ByteLevel, or Split... and then ByteLevel.
std::vector<std::string> parse_pre_tokenizer(const Json& root) {
  const Json& top = object_field(root, "root", "pre_tokenizer");
  const bool sequence = string_field(top, "pre_tokenizer", "type") == "Sequence";
  const Json stages = sequence ? array_field(top, "pre_tokenizer", "pretokenizers") : Json::array({top});
  std::vector<std::string> patterns;
  for (size_t i = 0; i < stages.size(); ++i) {
    const std::string where = sequence ? fmt::format("pre_tokenizer.pretokenizers[{}]", i) : "pre_tokenizer";
    const std::string type = string_field(stages[i], where, "type");
    const bool last = i + 1 == stages.size();
    check(last ? type == "ByteLevel" : type == "Split", "{}.type is '{}', expected '{}'", where, type,
          last ? "ByteLevel" : "Split");
    if (!last) {
      patterns.push_back(parse_split(stages[i], where));
      continue;
    }
    check(!bool_field(stages[i], where, "add_prefix_space", true),
          "{}.add_prefix_space is true, not supported", where);
    if (bool_field(stages[i], where, "use_regex", true)) patterns.emplace_back(kGpt2Pattern);
  }
  check(!stages.empty(), "pre_tokenizer.pretokenizers is empty, expected ByteLevel");
  return patterns;
}

// A post-processor may stay when it adds no token: encode adds none.
void check_post_processor(const Json& processor, const std::string& where) {
  const std::string type = string_field(processor, where, "type");
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    const Json& inner = array_field(processor, where, "processors");
    for (size_t i = 0; i < inner.size(); ++i) {
      check(inner[i].is_object() && inner[i].value("type", Json()) != "Sequence",
            "{}.processors[{}] is not supported", where, i);
      check_post_processor(inner[i], fmt::format("{}.processors[{}]", where, i));
    }
    return;
  }
  check(type == "TemplateProcessing", "{}.type is '{}', which is not supported", where, type);
  for (const Json& part : array_field(processor, where, "single")) {
    check(part.is_object() && part.contains("Sequence"),
          "{}.single adds a special token, which is not supported", where);
  }
}

void check_decoder(const Json& root) {
  const Json* decoder = find_field(root, "root", "decoder");
  if (decoder == nullptr) return;
  const std::string type = string_field(*decoder, "decoder", "type");
  check(type == "ByteLevel", "decoder.type is '{}', only 'ByteLevel' is supported", type);
}

void check_model(const Json& model) {
  const std::string type = string_field(model, "model", "type");
  check(type == "BPE", "model.type is '{}', only 'BPE' is supported", type);
  for (const char* key : {"dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"}) {
    reject(model, "model", key);
  }
}

}  // namespace

TokenizerParts parse_tokenizer_json(std::string_view text) {
  const Json root = parse_json(text);
  for (const char* key : {"normalizer", "truncation", "padding"}) reject(root, "root", key);
  if (const Json* processor = find_field(root, "root", "post_processor")) {
    check_post_processor(*processor, "post_processor");
  }
  check_decoder(root);
  const Json& model = object_field(root, "root", "model");
  check_model(model);
  TokenizerParts parts;
  parts.added = parse_added(root);
  parts.tokens = parse_vocab(object_field(model, "model", "vocab"), parts.added);
  parts.merges = parse_merges(model);
  parts.whole_first = bool_field(model, "model", "ignore_merges", false);
  parts.split_patterns = parse_pre_tokenizer(root);
  return parts;
}

}  // namespace kilin::text
