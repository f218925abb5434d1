// SPDX-License-Identifier: Apache-2.0
#include "io/json_lines.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kilin::io {
namespace {

std::string texts_of(std::string_view text) {
  std::string all;
  for_each_json_line(text, "f.jsonl", [&](const JsonReader& record, int64_t line) {
    all += std::to_string(line) + record.string("text") + ";";
  });
  return all;
}

std::string error_of(std::string_view text) {
  try {
    return "no error: " + texts_of(text);
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(JsonLines, gives_every_record_with_its_line) {
  EXPECT_EQ(texts_of("{\"text\": \"a\"}\n\n \r\n{\"text\": \"b\", \"n\": 1}\r\n{\"text\": \"c\"}"),
            "1a;4b;5c;");
}

TEST(JsonLines, errors_name_file_line_and_key) {
  EXPECT_EQ(error_of("{\"text\": \"a\"}\n{\"text\": 3}"),
            "f.jsonl:2: key 'text': found 3, expected a string");
  EXPECT_EQ(error_of("{\"body\": \"a\"}"), "f.jsonl:1: key 'text': missing, expected a string");
  EXPECT_EQ(error_of("\n[1]"), "f.jsonl:2: found an array of 1, expected a JSON object");
  EXPECT_EQ(error_of("\n\n"), "f.jsonl: found no records, expected a JSON object per line");
  EXPECT_EQ(error_of("{\"text\": \"a\"").rfind("f.jsonl:1: line 1, column 12: ", 0), 0u);
  EXPECT_EQ(error_of("{\"text\": \"\xff\"}").rfind("f.jsonl:1: ", 0), 0u);
}

}  // namespace
}  // namespace kilin::io
