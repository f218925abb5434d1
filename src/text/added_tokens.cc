// SPDX-License-Identifier: Apache-2.0
#include "text/added_tokens.h"

#include <algorithm>

#include "base/error.h"
#include "text/code_point_set.h"

namespace kilin::text {
namespace {

bool is_space(char32_t c) {
  static const CodePointSet spaces = CodePointSet::white_space();
  return spaces.contains(c);
}

// Length of the white space that the text starts with.
size_t leading_space(std::string_view text) {
  size_t length = 0;
  while (length < text.size() && is_space(utf8_decode(text.data() + length))) {
    length += utf8_length(text[length]);
  }
  return length;
}

// Length of the text without the white space at its end.
size_t without_trailing_space(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t start = end - 1;
    while ((static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
    if (!is_space(utf8_decode(text.data() + start))) break;
    end = start;
  }
  return end;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end(),
            [](const auto& a, const auto& b) { return a.content < b.content; });
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    check(!token.content.empty(), "added token {} is empty", token.id);
    if (i > 0 && token.content == tokens_[i - 1].content) {
      fail("added tokens {} and {} have the same text '{}'", tokens_[i - 1].id, token.id, token.content);
    }
    starts_[static_cast<uint8_t>(token.content[0])] = true;
  }
}

// Narrows the sorted tokens to those that agree with the text, one byte after the other.
const AddedToken* AddedTokenFinder::longest_at(std::string_view text) const {
  const AddedToken* longest = nullptr;
  auto first = tokens_.begin(), last = tokens_.end();
  for (size_t depth = 0; first != last; ++depth) {
    if (first->content.size() == depth) {
      longest = &*first++;
      if (first == last) break;
    }
    if (depth == text.size()) break;
    const auto byte = static_cast<uint8_t>(text[depth]);
    const auto byte_of = [depth](const AddedToken& token) {
      return static_cast<uint8_t>(token.content[depth]);
    };
    first = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) < byte; });
    last = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) == byte; });
  }
  return longest;
}

void AddedTokenFinder::split(std::string_view text, bool parse_special,
                             const std::function<void(std::string_view)>& on_text,
                             const std::function<void(int32_t)>& on_token) const {
  size_t done = 0, at = 0;
  while (at < text.size()) {
    if (!starts_[static_cast<uint8_t>(text[at])]) {
      ++at;
      continue;
    }
    const AddedToken* token = longest_at(text.substr(at));
    if (token == nullptr) {
      ++at;
      continue;
    }
    const size_t match_end = at + token->content.size();
    if (parse_special || !token->special) {
      size_t begin = at, end = match_end;
      if (token->lstrip) begin = std::max(done, without_trailing_space(text.substr(0, begin)));
      if (token->rstrip) end += leading_space(text.substr(end));
      if (done < begin) on_text(text.substr(done, begin - done));
      on_token(token->id);
      done = end;
    }
    at = match_end;
  }
  if (done < text.size()) on_text(text.substr(done));
}

}  // namespace kilin::text
