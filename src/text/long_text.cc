// SPDX-License-Identifier: Apache-2.0
#include "text/long_text.h"

#include "text/code_point_set.h"

namespace kilin::text {
namespace {

constexpr size_t kMaxCharacters = 400'000;
constexpr size_t kMaxRun = 25'000;

bool is_python_space(char32_t c) {
  static const CodePointSet spaces = CodePointSet::white_space().unite(CodePointSet({{0x1C, 0x1F}}));
  if (c < 0x80) return c == ' ' || (c >= 0x9 && c <= 0xD) || (c >= 0x1C && c <= 0x1F);
  return spaces.contains(c);
}

}  // namespace

std::vector<std::string_view> cut_long_text(std::string_view text) {
  if (text.size() <= kMaxRun) return {text};
  std::vector<std::string_view> parts;
  size_t part_start = 0, characters = 0, run = 0;
  bool in_space = false;
  for (size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
    const bool space = is_python_space(utf8_decode(text.data() + at));
    const bool window_full = characters == kMaxCharacters;
    if (window_full) characters = run = 0;
    run = run > 0 && space == in_space ? run + 1 : 1;
    if (window_full || run > kMaxRun) {
      parts.push_back(text.substr(part_start, at - part_start));
      part_start = at;
      run = 1;
    }
    in_space = space;
    ++characters;
  }
  parts.push_back(text.substr(part_start));
  return parts;
}

}  // namespace kilin::text
