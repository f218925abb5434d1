// SPDX-License-Identifier: Apache-2.0
#include "eval/records.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kilin::eval {
namespace {

using Texts = std::vector<std::string>;

Record only(std::string_view line, RecordKind kind) { return parse_records(line, kind, "f.jsonl").at(0); }

void expect_error(const std::string& expected, std::string_view line, RecordKind kind) {
  try {
    parse_records(line, kind, "f.jsonl");
    ADD_FAILURE() << line << " was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).substr(0, expected.size()), expected);
  }
}

TEST(Records, labels) {
  const auto records = parse_records(R"({"text": "a", "label": "x", "id": 7})"
                                     "\n\n"
                                     R"({"prompt": "b\n", "label": "w"})",
                                     RecordKind::kLabel, "f");
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].prompt, "a");
  EXPECT_EQ(records[1].prompt, "b\n");
  EXPECT_EQ(records[1].answers, (Texts{"w"}));
  EXPECT_EQ(records[1].line, 3);
  EXPECT_FALSE(records[1].delimiter.has_value());
  EXPECT_EQ(labels_of(records), (Texts{"w", "x"}));
}

TEST(Records, training_files_are_taken_as_they_are) {
  const Record completion = only(R"({"prompt": "The name is", "completion": " sh\n"})", RecordKind::kAnswer);
  EXPECT_EQ(completion.delimiter, " ");
  EXPECT_EQ(completion.answers, (Texts{"sh"}));
  const Record chat =
      only(R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "man-db"}]})",
           RecordKind::kLabel);
  ASSERT_EQ(chat.messages.size(), 1u);
  EXPECT_EQ(chat.messages[0].content, "q");
  EXPECT_EQ(chat.answers, (Texts{"man-db"}));
  const Record own =
      only(R"({"messages": [{"role": "user", "content": "q"}], "label": "x"})", RecordKind::kLabel);
  EXPECT_EQ(own.messages.size(), 1u);
  EXPECT_EQ(own.answers, (Texts{"x"}));
}

TEST(Records, choices) {
  EXPECT_EQ(only(R"({"prompt": "p", "choices": ["a", "b"], "answer": 1})", RecordKind::kChoice).right, 1);
  const Record by_text =
      only(R"({"prompt": "p", "choices": ["a", "b"], "answer": "a"})", RecordKind::kChoice);
  EXPECT_EQ(by_text.right, 0);
  EXPECT_EQ(by_text.choices, (Texts{"a", "b"}));
  EXPECT_EQ(only(R"({"prompt": "p", "answer": ["a", "b"]})", RecordKind::kAnswer).answers, (Texts{"a", "b"}));
}

TEST(Records, errors_name_file_line_and_key) {
  const auto label = RecordKind::kLabel;
  const auto choice = RecordKind::kChoice;
  const auto answer = RecordKind::kAnswer;
  expect_error("f.jsonl:2: key 'label': found 3, expected a string",
               "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"a\", \"label\": 3}", label);
  expect_error("f.jsonl:1: key 'label': found \" \", expected a text that is not empty",
               R"({"text": "a", "label": " "})", label);
  expect_error("f.jsonl:1: found no key 'prompt' or 'text' or 'messages', expected one", R"({"label": "x"})",
               label);
  expect_error("f.jsonl:1: found keys 'prompt' and 'text', expected one of them",
               R"({"prompt": "a", "text": "b", "label": "x"})", label);
  expect_error("f.jsonl:1: found no key 'label' or 'completion', expected one", R"({"text": "a"})", label);
  expect_error("f.jsonl:1: found keys 'answer' and 'completion'",
               R"({"prompt": "a", "answer": "x", "completion": "y"})", answer);
  expect_error("f.jsonl:1: key 'messages': found an array of 1, expected a last message of the assistant",
               R"({"messages": [{"role": "user", "content": "q"}]})", answer);
  expect_error("f.jsonl:1: key 'messages[0].role': found \"bot\"",
               R"({"messages": [{"role": "bot", "content": "q"}]})", answer);
  expect_error("f.jsonl:1: key 'answer': found an array of 0, expected at least one answer",
               R"({"prompt": "p", "answer": []})", answer);
  expect_error("f.jsonl:1: key 'choices': found an array of 1, expected at least two texts",
               R"({"prompt": "p", "choices": ["a"], "answer": 0})", choice);
  expect_error("f.jsonl:1: key 'choices': found an array of 2, expected texts that differ",
               R"({"prompt": "p", "choices": ["a", "a"], "answer": 0})", choice);
  expect_error("f.jsonl:1: key 'choices[1]': found 2, expected a string",
               R"({"prompt": "p", "choices": ["a", 2], "answer": 0})", choice);
  expect_error("f.jsonl:1: key 'answer': found 2, expected an integer from 0 to 1",
               R"({"prompt": "p", "choices": ["a", "b"], "answer": 2})", choice);
  expect_error("f.jsonl:1: key 'answer': found \"c\", expected one of the choices, or its number",
               R"({"prompt": "p", "choices": ["a", "b"], "answer": "c"})", choice);
  expect_error("f.jsonl:1: line 1, column", "{", label);
  expect_error("f.jsonl: found no records", "", label);
}

}  // namespace
}  // namespace kilin::eval
