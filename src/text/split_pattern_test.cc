// SPDX-License-Identifier: Apache-2.0
#include "text/split_pattern.h"

#include <gtest/gtest.h>

#include <chrono>

#include "base/error.h"
#include "text/code_point_set.h"

namespace kilin::text {
namespace {

// The pieces with '|' between them.
std::string split(const SplitPattern& pattern, std::string_view text) {
  std::vector<std::string_view> pieces;
  pattern.split(text, pieces);
  return fmt::format("{}", fmt::join(pieces, "|"));
}

std::string error_of(std::string_view pattern) {
  try {
    const SplitPattern compiled(pattern);
    return "no error";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(SplitPattern, kimi_pattern_cuts_as_the_published_cases) {
  const SplitPattern kimi(kKimiPattern);
  const std::pair<const char*, const char*> cases[] = {
      {"helloWorld", "hello|World"},
      {"getUserName", "get|User|Name"},
      {"iPhone", "i|Phone"},
      {"HTTPServer isn't ready", "HTTPServer| isn't| ready"},
      {"价格是100元", "价格是|100|元"},
      {"中文abc混合English", "中文|abc|混合|English"},
      {"  leading and   trailing  ", " | leading| and|  | trailing|  "},
      {"a\n\nb", "a|\n\n|b"},
      {"1234567", "123|456|7"},
      {"path/to/file.txt", "path|/to|/file|.txt"},
      {"x'S Y'T", "x'S| Y'T"},
      {"\u017F'\u017F", "\u017F'\u017F"},
      {"KaKe", "Ka|Ke"},
      {"\u212Aa\u212Ae", "\u212Aa|\u212Ae"},
      {"日本語テスト", "日本語|テスト"},
      {"emoji 🙂 and punct!!", "emoji| 🙂| and| punct|!!"},
      {"⺀一", "⺀一"},
      {"々〇x", "々〇|x"},
      {"豈二", "豈二"},
      {"\U0002EBF0y", "\U0002EBF0|y"},
      {"tab\tsep", "tab|\tsep"},
      {" 中文", " |中文"},
      {"中 文", "中| |文"},
      {"a中", "a|中"},
      {"中1", "中|1"},
  };
  for (const auto& [text, pieces] : cases) EXPECT_EQ(split(kimi, text), pieces);
}

TEST(SplitPattern, white_space_is_unicodes_property) {
  const SplitPattern spaces(R"(\s+)");
  EXPECT_EQ(split(spaces, "a\u3000\u0085 b"), "a|\u3000\u0085 |b");
  EXPECT_EQ(split(spaces, "a\u180Eb\u200Bc\x1F"), "a\u180Eb\u200Bc\x1F");
}

TEST(SplitPattern, classes_nest_intersect_and_negate) {
  EXPECT_EQ(split(SplitPattern("[a-z&&[^aeiou]]+"), "strength aid"), "str|e|ngth| ai|d");
  EXPECT_EQ(split(SplitPattern("[^a-z&&[^aeiou]]+"), "e1s"), "e1|s");  // ^ over the whole
  EXPECT_EQ(split(SplitPattern("[[a-c][x-z]]+"), "abyq"), "aby|q");
  EXPECT_EQ(split(SplitPattern(R"([a&&b]|x)"), "abx"), "ab|x");  // an empty class
}

TEST(SplitPattern, letters_of_unicode_16_are_letters) {
  const CodePointSet letters = CodePointSet::property("L");
  EXPECT_TRUE(letters.contains(0x2EBF0));   // CJK extension I, 15.1
  EXPECT_TRUE(letters.contains(0xA7CB));    // 16.0
  EXPECT_FALSE(letters.contains(0x323B0));  // 17.0
  EXPECT_TRUE(CodePointSet::property("Han").contains(0x31350));
  EXPECT_TRUE(CodePointSet::property("N").contains(0x10D40));
}

TEST(SplitPattern, case_is_ignored_only_in_its_group) {
  EXPECT_EQ(split(SplitPattern("(?i:k)|s"), "kK\u212AsS\u017F"), "k|K|\u212A|s|S\u017F");
  EXPECT_EQ(split(SplitPattern("(?i)s"), "sS\u017F"), "s|S|\u017F");
}

TEST(SplitPattern, an_empty_match_parts_two_pieces) {
  EXPECT_EQ(split(SplitPattern("x*"), "axxb"), "a|xx|b");
}

TEST(SplitPattern, what_the_engines_read_differently_is_an_error_with_its_offset) {
  const std::pair<const char*, const char*> cases[] = {
      {R"(a\w)", "byte 3: this escape"},  {"(?<=a)b", "byte 0: this kind of group"},
      {"a(?i)b", "byte 1: this kind"},    {"^a", "byte 0: anchors"},
      {"[a", "a class is not closed"},    {"(a", "a group is not closed"},
      {"a)", "byte 1: ')' without '('"},  {"a{1,3}+", "'+' after '}'"},
      {"[[:alpha:]]", "POSIX classes"},   {"[a-z--b]", "this class operator"},
      {R"(\p{Greek})", "unknown prop"},   {"*a", "a quantifier without"},
      {"a{5,2}", "bad repeat counts"},    {R"((?i:\p{L}))", "case-insensitive match"},
      {R"(\x{110000})", "not a code"},    {"[z-a]", "a bad range"},
      {"a\xFF", "invalid UTF-8 at byte"}, {R"(\)", "ends too early"},
  };
  for (const auto& [pattern, message] : cases) {
    EXPECT_NE(error_of(pattern).find(message), std::string::npos) << pattern << ": " << error_of(pattern);
  }
}

TEST(SplitPattern, an_exponential_pattern_ends_with_an_error) {
  const SplitPattern pattern("(?:(?:a+)+)+b");
  EXPECT_THROW(split(pattern, std::string(40, 'a') + "cb"), Error);
}

TEST(SplitPattern, a_megabyte_of_one_character_takes_linear_time) {
  const SplitPattern kimi(kKimiPattern);
  for (const char* unit : {"a", "A", " ", "1", "\n", "中", "!", "e\u0301", "\u0301"}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    std::vector<std::string_view> pieces;
    const auto start = std::chrono::steady_clock::now();
    kimi.split(text, pieces);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5)) << unit;
    size_t total = 0;
    for (const std::string_view piece : pieces) total += piece.size();
    EXPECT_EQ(total, text.size());
  }
}

}  // namespace
}  // namespace kilin::text
