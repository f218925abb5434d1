// SPDX-License-Identifier: Apache-2.0
#include "eval/inputs.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kilin::eval {
namespace {

using Ids = std::vector<int32_t>;
using Texts = std::vector<std::string>;

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(ParseTokenIds, TakesCommasAndSpaces) {
  EXPECT_EQ(parse_token_ids("1,2,3", 10, "ids"), (Ids{1, 2, 3}));
  EXPECT_EQ(parse_token_ids("  1, 2\t3 \r\n9", 10, "ids"), (Ids{1, 2, 3, 9}));
  EXPECT_TRUE(parse_token_ids(" ", 10, "ids").empty());
}

TEST(ParseTokenIds, SaysWhatIsWrong) {
  const auto parse = [](const char* text) { return [text] { parse_token_ids(text, 10, "--prompt-ids"); }; };
  EXPECT_EQ(error_of(parse("1,x2")), "--prompt-ids: found 'x2', expected a token id");
  EXPECT_EQ(error_of(parse("1.5")), "--prompt-ids: found '1.5', expected a token id");
  EXPECT_EQ(error_of(parse("1,10")), "--prompt-ids: found token id 10, expected 0 to 9");
  EXPECT_EQ(error_of(parse("-1")), "--prompt-ids: found token id -1, expected 0 to 9");
  EXPECT_EQ(error_of(parse("99999999999999999999")),
            "--prompt-ids: found token id 99999999999999999999, expected 0 to 9");
  EXPECT_EQ(error_of(parse("\x1b[31m")), "--prompt-ids: found '?[31m', expected a token id");
}

TEST(ParseIdLines, OneSequencePerLine) {
  const auto sequences = parse_id_lines("1 2 3\n\n4,5\r\n", 10, "f.ids");
  EXPECT_EQ(sequences, (std::vector<Ids>{{1, 2, 3}, {4, 5}}));
  EXPECT_EQ(error_of([] { parse_id_lines("1 2\n\n3\n", 10, "f.ids"); }),
            "f.ids, line 3: found 1 token id, expected at least 2");
  EXPECT_EQ(error_of([] { parse_id_lines("\n", 10, "f.ids"); }),
            "f.ids: found no token ids, expected a line of them per sequence");
}

TEST(SplitDocuments, AtFormFeeds) {
  EXPECT_EQ(split_documents("one\ftwo\n\f", "f"), (Texts{"one", "two\n", ""}));
  EXPECT_EQ(split_documents("", "f"), (Texts{""}));
  EXPECT_THROW(split_documents("a\xff", "f"), Error);
}

TEST(ParseJsonl, TakesTheFieldOfEveryLine) {
  EXPECT_EQ(parse_jsonl("{\"text\": \"a\"}\n\n{\"text\": \"b\\n\", \"n\": 1}\n", "text", "f"),
            (Texts{"a", "b\n"}));
  const auto parse = [](const char* text) { return [text] { parse_jsonl(text, "text", "f"); }; };
  EXPECT_EQ(error_of(parse("{\"text\": \"a\"}\n{")),
            "f, line 2: found no JSON object, expected one per line");
  EXPECT_EQ(error_of(parse("{\"body\": \"a\"}")),
            "f, line 1: found no key 'text', expected the text under it");
  EXPECT_EQ(error_of(parse("{\"text\": 3}")), "f, line 1: key 'text': found number, expected a string");
  EXPECT_EQ(error_of(parse("")), "f: found no records, expected a JSON object per line");
}

TEST(TokenStream, PutsEveryDocumentBetweenBosAndEos) {
  const Encode encode = [](std::string_view text) { return Ids(text.begin(), text.end()); };
  const Texts documents{"ab", "", "c"};
  EXPECT_EQ(token_stream(documents, encode, 1, 2), (Ids{1, 'a', 'b', 2, 1, 2, 1, 'c', 2}));
  EXPECT_EQ(token_stream(documents, encode, -1, 2), (Ids{'a', 'b', 2, 2, 'c', 2}));
  EXPECT_EQ(token_stream(documents, encode, 1, 2, 5), (Ids{1, 'a', 'b', 2, 1, 2}));
}

}  // namespace
}  // namespace kilin::eval
