// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace kilin::text {

// Byte-level BPE writes each byte as a visible character: itself where it is one in Latin-1, else U+0100 and
// up.
class ByteCharacters {
 public:
  static const ByteCharacters& get();

  // Of valid UTF-8; false when a character stands for no byte.
  bool to_bytes(std::string_view characters, std::string& bytes) const;
  std::string to_characters(std::string_view bytes) const;

 private:
  ByteCharacters();

  std::array<int16_t, 0x144> byte_of_;
  std::array<char32_t, 256> character_of_;
};

}  // namespace kilin::text
