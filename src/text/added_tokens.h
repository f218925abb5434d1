// SPDX-License-Identifier: Apache-2.0
// Tokens that are found in the text before it is split: the leftmost first, the longest of those that start
// there.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::text {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = true;
  bool normalized = false;  // looked for after those that are not, in the text between them
  bool lstrip = false;      // takes the white space before it along
  bool rstrip = false;      // and after it
};

class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);  // Error for two of the same content

  // Calls text(piece) and token(id) in the order of the text. With parse_special false a special token's text
  // is ordinary text (but still hides a shorter token that starts there, as in tokenizers).
  void split(std::string_view text, bool parse_special, const std::function<void(std::string_view)>& on_text,
             const std::function<void(int32_t)>& on_token) const;

 private:
  const AddedToken* longest_at(std::string_view text) const;

  std::vector<AddedToken> tokens_;  // sorted by content
  std::array<bool, 256> starts_{};  // bytes that a token starts with
};

}  // namespace kilin::text
