// SPDX-License-Identifier: Apache-2.0
#include "text/tokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "text/long_text.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

std::vector<AddedToken> sorted_by_id(std::vector<AddedToken> tokens) {
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  for (size_t i = 0; i < tokens.size(); ++i) {
    check(tokens[i].id >= 0, "added token '{}' has id {}", tokens[i].content, tokens[i].id);
    if (i > 0 && tokens[i].id == tokens[i - 1].id) {
      fail("added tokens '{}' and '{}' have the same id {}", tokens[i - 1].content, tokens[i].content,
           tokens[i].id);
    }
  }
  return tokens;
}

AddedTokenFinder finder_of(const std::vector<AddedToken>& tokens, bool normalized) {
  std::vector<AddedToken> chosen;
  std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(chosen),
               [normalized](const AddedToken& token) { return token.normalized == normalized; });
  return AddedTokenFinder(std::move(chosen));
}

int32_t size_of(const Vocabulary& vocabulary, const std::vector<AddedToken>& added) {
  return std::max(vocabulary.size(), added.empty() ? 0 : added.back().id + 1);
}

}  // namespace

Tokenizer::Tokenizer(TokenizerParts parts)
    : vocabulary_(std::make_shared<Vocabulary>(parts.tokens)),
      encoder_(vocabulary_, parts.merges, parts.whole_first),
      patterns_(parts.split_patterns.begin(), parts.split_patterns.end()),
      added_(sorted_by_id(std::move(parts.added))),
      exact_(finder_of(added_, false)),
      normalized_(finder_of(added_, true)),
      cut_long_text_(parts.cut_long_text),
      vocab_size_(size_of(*vocabulary_, added_)) {
  for (const AddedToken& token : added_) {
    const std::string_view own = token.id < vocabulary_->size() ? vocabulary_->bytes(token.id) : "";
    if (!own.empty() && own != token.content) {
      fail("added token '{}' has the id {} of the token '{}'", token.content, token.id, lossy_utf8(own));
    }
  }
  bos_ = named_id(parts.named.bos);
  eos_ = named_id(parts.named.eos);
  pad_ = named_id(parts.named.pad);
  unk_ = named_id(parts.named.unk);
}

std::optional<int32_t> Tokenizer::named_id(std::string_view text) const {
  if (text.empty()) return {};
  const std::optional<int32_t> id = token_to_id(text);
  check(id.has_value(), "tokenizer_config.json names the token '{}', which the vocabulary does not have",
        text);
  return id;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  check_utf8(text, "text");
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3);
  if (cut_long_text_) {
    for (const std::string_view part : cut_long_text(text)) encode_added(part, options.parse_special, ids);
  } else {
    encode_added(text, options.parse_special, ids);
  }
  return ids;
}

void Tokenizer::encode_added(std::string_view text, bool parse_special, std::vector<int32_t>& ids) const {
  const auto on_token = [&ids](int32_t id) { ids.push_back(id); };
  const auto on_ordinary = [&](std::string_view part) { encode_ordinary(part, ids); };
  const auto on_text = [&](std::string_view part) {
    normalized_.split(part, parse_special, on_ordinary, on_token);
  };
  exact_.split(text, parse_special, on_text, on_token);
}

void Tokenizer::encode_ordinary(std::string_view text, std::vector<int32_t>& ids) const {
  std::vector<std::string_view> pieces = {text}, cut;
  for (const SplitPattern& pattern : patterns_) {
    cut.clear();
    for (const std::string_view piece : pieces) pattern.split(piece, cut);
    pieces.swap(cut);
  }
  for (const std::string_view piece : pieces) encoder_.encode(piece, ids);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  for (const int32_t id : ids) {
    const std::string_view bytes = token_bytes(id);
    if (!skip_special || !is_special(id)) text += bytes;
  }
  return text;
}

void Tokenizer::check_id(int32_t id) const {
  check(id >= 0 && id < vocab_size_, "token id {} is outside the vocabulary of {}", id, vocab_size_);
}

const AddedToken* Tokenizer::added(int32_t id) const {
  const auto found =
      std::lower_bound(added_.begin(), added_.end(), id,
                       [](const AddedToken& token, int32_t wanted) { return token.id < wanted; });
  return found != added_.end() && found->id == id ? &*found : nullptr;
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  check_id(id);
  if (const AddedToken* token = added(id)) return token->content;
  return id < vocabulary_->size() ? vocabulary_->bytes(id) : "";
}

bool Tokenizer::is_special(int32_t id) const {
  check_id(id);
  const AddedToken* token = added(id);
  return token != nullptr && token->special;
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view bytes) const {
  for (const AddedToken& token : added_) {
    if (token.content == bytes) return token.id;
  }
  const int32_t id = vocabulary_->find(bytes);
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

}  // namespace kilin::text
