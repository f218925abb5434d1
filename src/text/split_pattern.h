// SPDX-License-Identifier: Apache-2.0
// The regex that cuts text into pieces before byte-pair encoding, as tiktoken (Rust) and tokenizers
// (Oniguruma) read it, run by PCRE2.
//
// PCRE2 never sees Unicode: its classes have no intersection, its \p{Han} and \s mean other sets, and its
// tables are those of whatever version is installed. Instead every set in the pattern is worked out here, the
// code points that no set tells apart become one letter of a small alphabet (about 20 for Kimi's pattern),
// the text is rewritten in that alphabet, one byte a character, and PCRE2 matches byte classes on it.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::text {

// Kimi's pattern (pat_str of its TikTokenTokenizer) and the one that ByteLevel with use_regex applies.
extern const std::string_view kKimiPattern;
extern const std::string_view kGpt2Pattern;

class SplitPattern {
 public:
  // Error naming the byte offset in the pattern when it is malformed or beyond what is supported.
  explicit SplitPattern(std::string_view pattern);

  // Appends the pieces of valid UTF-8 text, which together are the text: matches, and what lies between them.
  // Thread-safe. Error when matching takes unreasonably long.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

  // The same pattern as a regular expression over the alphabet, for tests and curious readers.
  const std::string& translated() const { return translated_; }
  size_t alphabet_size() const { return alphabet_size_; }

 private:
  std::string in_alphabet(std::string_view text) const;

  std::string translated_;
  size_t alphabet_size_ = 0;
  std::vector<uint8_t> letter_of_;    // of each code point
  std::shared_ptr<const void> code_;  // pcre2_code, which is not changed after its compilation
};

}  // namespace kilin::text
