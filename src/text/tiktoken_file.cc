// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <charconv>
#include <map>

#include "base/error.h"
#include "text/tokenizer_files.h"

namespace kilin::text {
namespace {

constexpr int32_t kReservedTokens = 256;  // Kimi's block after the ranks, named or not
constexpr const char* kAddedKey = "added_tokens_decoder";

// False for anything but canonical base64 with its padding.
bool decode_base64(std::string_view text, std::string& bytes) {
  static const auto kValues = [] {
    std::array<int8_t, 256> values;
    values.fill(-1);
    constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < kDigits.size(); ++i) {
      values[static_cast<uint8_t>(kDigits[i])] = static_cast<int8_t>(i);
    }
    return values;
  }();
  if (text.empty() || text.size() % 4 != 0) return false;
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
  bytes.clear();
  uint32_t bits = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool pad = i >= text.size() - padding;
    const int value = pad ? 0 : kValues[static_cast<uint8_t>(text[i])];
    if (value < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(value);
    if (i % 4 == 3) {
      for (const int shift : {16, 8, 0}) bytes.push_back(static_cast<char>(bits >> shift & 0xFF));
      bits = 0;
    }
  }
  for (size_t i = bytes.size() - padding; i < bytes.size(); ++i) {
    if (bytes[i] != 0) return false;
  }
  bytes.resize(bytes.size() - padding);
  return true;
}

struct RankedToken {
  std::string bytes;
  int32_t rank = 0;
};

RankedToken parse_line(std::string_view line, size_t number) {
  const size_t space = line.find(' ');
  check(space != std::string_view::npos, "line {}: no space, expected a token in base64 and its rank",
        number);
  RankedToken token;
  check(decode_base64(line.substr(0, space), token.bytes), "line {}: the token is not base64", number);
  const std::string_view rank = line.substr(space + 1);
  const auto [end, error] = std::from_chars(rank.data(), rank.data() + rank.size(), token.rank);
  check(error == std::errc() && end == rank.data() + rank.size() && token.rank >= 0 &&
            token.rank <= kMaxTokenId,
        "line {}: the rank is not a number from 0 to {}", number, kMaxTokenId);
  return token;
}

std::vector<std::string> parse_ranks(std::string_view text) {
  std::vector<std::string> tokens;
  size_t count = 0, number = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    RankedToken token = parse_line(line, number);
    const auto rank = static_cast<size_t>(token.rank);
    if (rank >= tokens.size()) tokens.resize(rank + 1);
    check(tokens[rank].empty(), "line {}: rank {} is there twice", number, rank);
    tokens[rank] = std::move(token.bytes);
    ++count;
  }
  check(count > 0, "no tokens");
  // The special ids begin at the number of ranks.
  check(count == tokens.size(), "{} tokens, but the highest rank is {}: expected ranks without gaps", count,
        tokens.size() - 1);
  return tokens;
}

int32_t parse_id_key(const std::string& key) {
  int32_t id = -1;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
  check(error == std::errc() && end == key.data() + key.size() && id >= 0 && id <= kMaxTokenId,
        "tokenizer_config.json: {}: '{}' is not a token id", kAddedKey, key);
  return id;
}

// Entries of added_tokens_decoder over Kimi's default names for the reserved block.
std::vector<AddedToken> special_tokens(const Json& config, int32_t ranks) {
  std::map<int32_t, AddedToken> tokens;
  for (int32_t id = ranks; id < ranks + kReservedTokens; ++id) {
    tokens[id] = {.id = id, .content = fmt::format("<|reserved_token_{}|>", id)};
  }
  if (!config.is_null() && find_field(config, "tokenizer_config.json", kAddedKey) != nullptr) {
    for (const auto& [key, entry] : object_field(config, "tokenizer_config.json", kAddedKey).items()) {
      const std::string where = fmt::format("tokenizer_config.json: {}.{}", kAddedKey, key);
      const int32_t id = parse_id_key(key);
      check(id >= ranks, "{} is below {}, the number of ranks", where, ranks);
      // tiktoken knows a special token's text and nothing else, so the other flags do not apply.
      tokens[id] = {.id = id,
                    .content = string_field(entry, where, "content"),
                    .special = bool_field(entry, where, "special", false)};
    }
  }
  std::vector<AddedToken> list;
  for (auto& [id, token] : tokens) list.push_back(std::move(token));
  return list;
}

}  // namespace

TokenizerParts parse_tiktoken(std::string_view text, const Json& config) {
  TokenizerParts parts;
  parts.tokens = parse_ranks(text);
  parts.merges = merges_of_ranked_vocabulary(Vocabulary(parts.tokens));
  parts.split_patterns = {std::string(kKimiPattern)};
  parts.added = special_tokens(config, static_cast<int32_t>(parts.tokens.size()));
  if (!config.is_null()) {
    const Json* kind = find_field(config, "tokenizer_config.json", "tokenizer_class");
    parts.cut_long_text = kind != nullptr && *kind == "TikTokenTokenizer";
  }
  return parts;
}

void read_named_tokens(const Json& config, NamedTokens& named) {
  const std::pair<const char*, std::string*> fields[] = {{"bos_token", &named.bos},
                                                         {"eos_token", &named.eos},
                                                         {"pad_token", &named.pad},
                                                         {"unk_token", &named.unk}};
  for (const auto& [key, text] : fields) {
    const Json* value = find_field(config, "tokenizer_config.json", key);
    if (value == nullptr || !text->empty()) continue;
    *text = value->is_object() ? string_field(*value, key, "content")
                               : string_field(config, "tokenizer_config.json", key);
  }
}

}  // namespace kilin::text
