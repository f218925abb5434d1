// SPDX-License-Identifier: Apache-2.0
#include "text/gguf_tokenizer.h"

#include <array>
#include <unordered_map>

#include "base/error.h"
#include "io/printable.h"
#include "text/byte_characters.h"
#include "text/gguf_tokenizer_keys.h"
#include "text/json_fields.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

using io::printable;

class GgufTokenizerParser {
 public:
  explicit GgufTokenizerParser(const io::GgufFile& file) : file_(file) {}

  TokenizerParts run() {
    require(file_.get_string(kModelKey) == kByteLevelModel, kModelKey, "found '{}', expected '{}'",
            printable(file_.get_string(kModelKey)), kByteLevelModel);
    const GgufPattern& pattern = read_pattern();
    parts_.split_patterns = {std::string(pattern.pattern)};
    parts_.whole_first = pattern.whole_first;
    parts_.cut_long_text = gguf_tokenizer_class(file_) == kTikTokenClass;
    read_tokens();
    read_merges(pattern);
    parts_.named = {named_token(kBosKey), named_token(kEosKey), named_token(kPadKey), named_token(kUnkKey)};
    return std::move(parts_);
  }

 private:
  template <class... Args>
  void require(bool ok, std::string_view key, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) [[unlikely]]
      fail("{}: key '{}': {}", file_.path(), key, fmt::format(format, std::forward<Args>(args)...));
  }

  const GgufPattern& read_pattern() const {
    const std::string& pre = file_.get_string(kPreKey);
    std::string known;
    for (const GgufPattern& pattern : kGgufPatterns) {
      if (pre == pattern.pre) return pattern;
      known += fmt::format("{}'{}'", known.empty() ? "" : " or ", pattern.pre);
    }
    fail("{}: key '{}': found '{}', expected {}, the splitters of text that Kilin has", file_.path(), kPreKey,
         printable(pre), known);
  }

  void read_tokens() {
    const std::vector<std::string>& tokens = file_.get_strings(kTokensKey);
    require(tokens.size() <= kMaxTokenId, kTokensKey, "found {} tokens, expected at most {}", tokens.size(),
            kMaxTokenId);
    const bool typed = file_.has(kTypesKey);
    if (typed) {
      const size_t types = file_.get_ints(kTypesKey).size();
      require(types == tokens.size(), kTypesKey, "found {} types, expected {}, one of each token", types,
              tokens.size());
    }
    parts_.tokens.resize(tokens.size());
    for (size_t id = 0; id < tokens.size(); ++id) {
      const size_t invalid = find_invalid_utf8(tokens[id]);
      require(invalid == std::string_view::npos, kTokensKey, "token {}: found '{}', expected UTF-8", id,
              printable(tokens[id]));
      const int64_t type = typed ? file_.get_ints(kTypesKey)[id] : kNormalToken;
      read_token(static_cast<int32_t>(id), tokens[id], type);
    }
  }

  void read_token(int32_t id, const std::string& text, int64_t type) {
    std::string& bytes = parts_.tokens[static_cast<size_t>(id)];
    switch (type) {
      case kNormalToken:
        require(ByteCharacters::get().to_bytes(text, bytes) && !bytes.empty(), kTokensKey,
                "token {}: found '{}', expected characters of the byte-level alphabet", id, printable(text));
        break;
      case kUnknownToken:
      case kControlToken:
      case kUserDefinedToken:
        require(!text.empty(), kTokensKey, "token {}: found an added token without text, expected some", id);
        parts_.added.push_back({.id = id, .content = text, .special = type != kUserDefinedToken});
        break;
      case kByteToken:
        bytes = read_byte(id, text);
        break;
      case kUnusedToken:
        break;
      default:
        require(false, kTypesKey, "token {}: found type {}, expected 1 to 6", id, type);
    }
  }

  // "<0x0A>"
  std::string read_byte(int32_t id, const std::string& text) const {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    const bool framed = text.size() == 6 && text.starts_with("<0x") && text.ends_with('>');
    const size_t high = framed ? kDigits.find(text[3]) : kDigits.npos;
    const size_t low = framed ? kDigits.find(text[4]) : kDigits.npos;
    require(high != kDigits.npos && low != kDigits.npos, kTokensKey,
            "token {}: found the byte token '{}', expected a form like '<0x0A>'", id, printable(text));
    return std::string(1, static_cast<char>(high << 4 | low));
  }

  // llama.cpp's merges are texts, so that one may make an added token: such a token is an ordinary one too.
  void read_merges(const GgufPattern& pattern) {
    if (!file_.has(kMergesKey) && pattern.whole_first) {
      parts_.merges = merges_of_ranked_vocabulary(Vocabulary(parts_.tokens));
      return;
    }
    const std::vector<std::string>& tokens = file_.get_strings(kTokensKey);
    std::unordered_map<std::string_view, int32_t> ids;
    for (size_t id = tokens.size(); id-- > 0;) {
      const bool hole = file_.has(kTypesKey) && file_.get_ints(kTypesKey)[id] == kUnusedToken;
      if (!hole) ids[tokens[id]] = static_cast<int32_t>(id);
    }
    const auto id_of = [&](std::string_view token, size_t index) {
      const auto found = ids.find(token);
      require(found != ids.end(), kMergesKey, "merge {}: found '{}', which is none of the tokens", index,
              printable(token));
      std::string& bytes = parts_.tokens[static_cast<size_t>(found->second)];
      const bool usable = !bytes.empty() || (ByteCharacters::get().to_bytes(token, bytes) && bytes == token);
      require(usable, kMergesKey, "merge {}: found the added token '{}', expected ordinary tokens", index,
              printable(token));
      return found->second;
    };
    for (const std::string& merge : file_.get_strings(kMergesKey)) {
      const size_t index = parts_.merges.size();
      const size_t space = merge.find(' ');
      require(space != merge.npos && merge.find(' ', space + 1) == merge.npos, kMergesKey,
              "merge {}: found '{}', expected two tokens with a space between", index, printable(merge));
      const std::string left = merge.substr(0, space), right = merge.substr(space + 1);
      parts_.merges.push_back(
          {id_of(left, index), id_of(right, index), id_of(left + right, index), static_cast<int32_t>(index)});
    }
  }

  // The text of the token whose id a key has; "" without the key.
  std::string named_token(const char* key) const {
    if (!file_.has(key)) return "";
    const int64_t id = file_.get_int(key);
    const auto size = static_cast<int64_t>(parts_.tokens.size());
    require(id >= 0 && id < size, key, "found {}, expected an id from 0 to {}", id, size - 1);
    for (const AddedToken& token : parts_.added) {
      if (token.id == id) return token.content;
    }
    const std::string& bytes = parts_.tokens[static_cast<size_t>(id)];
    require(!bytes.empty(), key, "found {}, an unused id, expected that of a token", id);
    return bytes;
  }

  const io::GgufFile& file_;
  TokenizerParts parts_;
};

}  // namespace

std::string_view gguf_tokenizer_class(const io::GgufFile& file) {
  if (!file.has(kGgufTokenizerClassKey)) {
    return file.get_string(kPreKey, "") == kKimiPre ? kTikTokenClass : kFastClass;
  }
  const std::string& found = file.get_string(kGgufTokenizerClassKey);
  check(found == kTikTokenClass || found == kFastClass, "{}: key '{}': found '{}', expected '{}' or '{}'",
        file.path(), kGgufTokenizerClassKey, printable(found), kTikTokenClass, kFastClass);
  return found == kTikTokenClass ? kTikTokenClass : kFastClass;
}

std::optional<ChatTemplateText> gguf_chat_template(const io::GgufFile& file) {
  if (!file.has(kGgufChatTemplateKey)) return {};
  const auto text_of = [&file](const char* key) {
    const std::string& text = file.get_string(key);
    check(find_invalid_utf8(text) == std::string_view::npos, "{}: key '{}': found '{}', expected UTF-8",
          file.path(), key, printable(text));
    return text;
  };
  ChatTemplateText found = {text_of(kGgufChatTemplateKey), {}};
  if (file.has(kToolTemplateKey)) found.tools = text_of(kToolTemplateKey);
  return found;
}

TokenizerParts parse_gguf_tokenizer(const io::GgufFile& file) { return GgufTokenizerParser(file).run(); }

Tokenizer Tokenizer::from_gguf(const io::GgufFile& file) {
  TokenizerParts parts = parse_gguf_tokenizer(file);
  try {
    return Tokenizer(std::move(parts));
  } catch (const Error& error) {
    fail("{}: tokenizer: {}", file.path(), error.what());
  }
}

}  // namespace kilin::text
