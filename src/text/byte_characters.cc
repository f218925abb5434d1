// SPDX-License-Identifier: Apache-2.0
#include "text/byte_characters.h"

#include "text/utf8.h"

namespace kilin::text {

const ByteCharacters& ByteCharacters::get() {
  static const ByteCharacters characters;
  return characters;
}

ByteCharacters::ByteCharacters() {
  byte_of_.fill(-1);
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    character_of_[byte] = visible ? static_cast<char32_t>(byte) : next++;
    byte_of_[character_of_[byte]] = static_cast<int16_t>(byte);
  }
}

bool ByteCharacters::to_bytes(std::string_view characters, std::string& bytes) const {
  bytes.clear();
  for (size_t at = 0; at < characters.size(); at += utf8_length(characters[at])) {
    const char32_t c = utf8_decode(characters.data() + at);
    if (c >= byte_of_.size() || byte_of_[c] < 0) return false;
    bytes.push_back(static_cast<char>(byte_of_[c]));
  }
  return true;
}

std::string ByteCharacters::to_characters(std::string_view bytes) const {
  std::string characters;
  for (const char byte : bytes) append_utf8(characters, character_of_[static_cast<uint8_t>(byte)]);
  return characters;
}

}  // namespace kilin::text
