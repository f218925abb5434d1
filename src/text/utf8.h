// SPDX-License-Identifier: Apache-2.0
// UTF-8 as the Unicode standard's table 3-7 has it: no surrogates, no overlong forms, nothing above U+10FFFF.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kilin::text {

enum class Utf8Kind : uint8_t { kValid, kInvalid, kIncomplete };

// One step over bytes: a character, or the longest prefix of one that the next byte breaks (kInvalid, at
// least one byte) or the end cuts off (kIncomplete). Each broken prefix is one U+FFFD in lossy text, as in
// Rust and Python.
struct Utf8Step {
  Utf8Kind kind;
  uint8_t length;
};

inline constexpr char32_t kEndOfUnicode = 0x110000;
inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

Utf8Step next_utf8(std::string_view bytes);  // bytes must not be empty

// Offset of the first byte that is not part of a character; npos when all is well.
size_t find_invalid_utf8(std::string_view text);

// Error naming `what` and the byte offset.
void check_utf8(std::string_view text, std::string_view what);

// Length of the character that starts with this byte of valid text.
inline size_t utf8_length(char lead) {
  const auto byte = static_cast<uint8_t>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The character at the start of valid text.
inline char32_t utf8_decode(const char* at) {
  const auto byte = [at](int i) { return static_cast<char32_t>(static_cast<uint8_t>(at[i])); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return lead;
  if (lead < 0xE0) return (lead & 0x1F) << 6 | (byte(1) & 0x3F);
  if (lead < 0xF0) return (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  return (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
}

void append_utf8(std::string& text, char32_t code_point);

// Any bytes as text, U+FFFD for what is broken.
std::string lossy_utf8(std::string_view bytes);

}  // namespace kilin::text
