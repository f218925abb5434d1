// SPDX-License-Identifier: Apache-2.0
#include "text/utf8.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kilin::text {
namespace {

TEST(Utf8, every_code_point_survives_the_round_trip) {
  for (char32_t c = 0; c < kEndOfUnicode; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    append_utf8(text, c);
    ASSERT_EQ(find_invalid_utf8(text), std::string_view::npos) << static_cast<uint32_t>(c);
    ASSERT_EQ(utf8_length(text[0]), text.size()) << static_cast<uint32_t>(c);
    ASSERT_TRUE(utf8_decode(text.data()) == c);
  }
}

TEST(Utf8, invalid_bytes_are_found_at_their_offset) {
  const std::pair<std::string_view, size_t> cases[] = {
      {"abc\x80", 3},          {"\xC0\x80", 0},         {"\xED\xA0\x80", 0},
      {"\xF4\x90\x80\x80", 0}, {"ab\xE4\xB8", 2},       {"0123456789\xFF!", 10},
      {"\xF0\x8F\xBF\xBF", 0}, {"\xF5\x80\x80\x80", 0}, {"\xE4\xB8\xAD\xE4", 3}};
  for (const auto& [text, offset] : cases) EXPECT_EQ(find_invalid_utf8(text), offset);
}

TEST(Utf8, an_error_names_what_is_invalid_and_where) {
  try {
    check_utf8("ab\xFF", "prompt");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "prompt: invalid UTF-8 at byte 2 of 3 (byte 0xFF)");
  }
}

TEST(Utf8, lossy_text_has_one_replacement_for_each_longest_broken_prefix) {
  // Python: bytes.decode("utf-8", "replace").
  EXPECT_EQ(lossy_utf8("a\xFF\xFE z"), "a\uFFFD\uFFFD z");
  EXPECT_EQ(lossy_utf8("\xE4\xB8|"), "\uFFFD|");
  EXPECT_EQ(lossy_utf8("\xF0\x9F\x99"), "\uFFFD");
  EXPECT_EQ(lossy_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(lossy_utf8("\xF0\x80\x80|\xE4\xE4\xB8\xAD"), "\uFFFD\uFFFD\uFFFD|\uFFFD中");
}

}  // namespace
}  // namespace kilin::text
