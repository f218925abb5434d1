// SPDX-License-Identifier: Apache-2.0
#include "eval/records.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "io/json_lines.h"

namespace kilin::eval {
namespace {

constexpr const char* kSpace = " \t\r\n";

std::string not_empty(const io::JsonReader& json, const char* key) {
  std::string text = json.string(key);
  if (text.find_first_not_of(kSpace) == std::string::npos) json.refuse(key, "a text that is not empty");
  return text;
}

std::vector<Message> messages_of(const io::JsonReader& json) {
  std::vector<Message> messages;
  for (const io::JsonReader& message : json.objects("messages")) {
    messages.push_back({message.choice("role", {"system", "user", "assistant"}), message.string("content")});
  }
  if (messages.empty()) json.refuse("messages", "at least one message");
  return messages;
}

// The one of `keys` that the record has.
const char* only_key(const io::JsonReader& json, std::initializer_list<const char*> keys) {
  const char* found = nullptr;
  std::string all;
  for (const char* key : keys) {
    all += fmt::format("{}'{}'", all.empty() ? "" : " or ", key);
    if (!json.has(key)) continue;
    check(found == nullptr, "{}: found keys '{}' and '{}', expected one of them", json.file(),
          found == nullptr ? "" : found, key);
    found = key;
  }
  check(found != nullptr, "{}: found no key {}, expected one", json.file(), all);
  return found;
}

void split_completion(const io::JsonReader& json, Record& record) {
  const std::string text = not_empty(json, "completion");
  const size_t begin = text.find_first_not_of(kSpace);
  record.delimiter = text.substr(0, begin);
  record.answers.push_back(text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin));
}

void take_last_message(const io::JsonReader& json, Record& record) {
  if (record.messages.back().role != "assistant") {
    json.refuse("messages", "a last message of the assistant, the answer");
  }
  record.answers.push_back(record.messages.back().content);
  record.messages.pop_back();
  if (record.messages.empty()) json.refuse("messages", "a message before the answer");
}

void read_answers(const io::JsonReader& json, const char* key, Record& record) {
  if (key == std::string_view("answer") && json.has(key) && json.value(key).is_array()) {
    record.answers = json.strings(key);
    if (record.answers.empty()) json.refuse(key, "at least one answer");
    return;
  }
  record.answers.push_back(not_empty(json, key));
}

void read_choices(const io::JsonReader& json, Record& record) {
  record.choices = json.strings("choices");
  if (record.choices.size() < 2) json.refuse("choices", "at least two texts");
  if (std::any_of(record.choices.begin(), record.choices.end(),
                  [](const std::string& c) { return c.empty(); })) {
    json.refuse("choices", "texts that are not empty");
  }
  if (std::set(record.choices.begin(), record.choices.end()).size() != record.choices.size()) {
    json.refuse("choices", "texts that differ");
  }
  const auto count = static_cast<int64_t>(record.choices.size());
  if (json.has("answer") && json.value("answer").is_string()) {
    const auto at = std::find(record.choices.begin(), record.choices.end(), json.string("answer"));
    record.right = at - record.choices.begin();
    if (record.right == count) json.refuse("answer", "one of the choices, or its number");
    return;
  }
  record.right = json.integer("answer", 0, count - 1);
}

Record read_record(const io::JsonReader& json, RecordKind kind) {
  Record record;
  const std::string input = only_key(json, {"prompt", "text", "messages"});
  if (input == "messages") {
    record.messages = messages_of(json);
  } else {
    record.prompt = json.string(input);
  }
  if (kind == RecordKind::kChoice) {
    read_choices(json, record);
    return record;
  }
  const char* const own = kind == RecordKind::kLabel ? "label" : "answer";
  if (input == "messages" && !json.has(own)) {
    take_last_message(json, record);
  } else if (only_key(json, {own, "completion"}) == std::string_view("completion")) {
    split_completion(json, record);
  } else {
    read_answers(json, own, record);
  }
  return record;
}

}  // namespace

std::vector<Record> parse_records(std::string_view jsonl, RecordKind kind, const std::string& name) {
  std::vector<Record> records;
  io::for_each_json_line(jsonl, name, [&](const io::JsonReader& json, int64_t line) {
    records.push_back(read_record(json, kind));
    records.back().line = line;
  });
  return records;
}

std::vector<std::string> labels_of(const std::vector<Record>& records) {
  std::set<std::string> labels;
  for (const Record& record : records) labels.insert(record.answers.begin(), record.answers.end());
  return {labels.begin(), labels.end()};
}

}  // namespace kilin::eval
