// SPDX-License-Identifier: Apache-2.0
// Questions with answers, a JSON object per line. What the model reads is one of
//   "prompt": TEXT, or "text": TEXT
//   "messages": [{"role": "system|user|assistant", "content": TEXT}, ...]    for its chat template
// and the answer, by task:
//   classification   "label": TEXT
//   choice           "choices": [TEXT, ...], "answer": number of the right one from 0, or its text
//   extraction       "answer": TEXT, or a list of texts of which each is right
// For classification and extraction it may also be "completion": TEXT, or the last of the messages: files
// that `kilin train` takes can be evaluated as they are. Other keys are passed over.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::eval {

struct Message {
  std::string role, content;
};

struct Record {
  int64_t line = 0;               // in its file, from 1
  std::string prompt;             // unless there are messages
  std::vector<Message> messages;  // without the answer
  // What stands between prompt and answer, where the record itself says: the white space that begins a
  // completion.
  std::optional<std::string> delimiter;
  std::vector<std::string> answers;  // classification: one; choice: none
  std::vector<std::string> choices;  // choice: two or more
  int64_t right = -1;                // choice: index of the right one
};

enum class RecordKind { kLabel, kChoice, kAnswer };

// Throws Error "NAME:LINE: key 'KEY': ..." for what is no such record.
std::vector<Record> parse_records(std::string_view jsonl, RecordKind kind, const std::string& name);

// The labels that occur, sorted.
std::vector<std::string> labels_of(const std::vector<Record>& records);

}  // namespace kilin::eval
