// SPDX-License-Identifier: Apache-2.0
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

using nlohmann::json;

std::string describe(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return fmt::format("an array of {}", value.size());
  if (value.is_string()) return fmt::format("\"{}\"", printable(value.get_ref<const std::string&>()));
  return value.dump();
}

std::string describe_range(int64_t min, int64_t max) {
  using Limits = std::numeric_limits<int64_t>;
  if (min == Limits::min() && max == Limits::max()) return "an integer";
  if (max == Limits::max()) return fmt::format("an integer of at least {}", min);
  return fmt::format("an integer from {} to {}", min, max);
}

std::string describe_range(double min, double max) {
  using Limits = std::numeric_limits<double>;
  if (min == -Limits::max() && max == Limits::max()) return "a number";
  if (max == Limits::max()) return fmt::format("a number of at least {}", min);
  return fmt::format("a number from {} to {}", min, max);
}

std::optional<int64_t> as_integer(const json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return std::nullopt;
  }
  const auto number = value.get<int64_t>();
  if (number < min || number > max) return std::nullopt;
  return number;
}

}  // namespace

struct JsonReader::Seen {
  std::set<std::string, std::less<>> keys;
  std::map<std::string, JsonReader, std::less<>> children;  // by "key" or "key[2]"
};

JsonReader JsonReader::open(const std::string& path, size_t max_bytes) {
  return JsonReader(parse_json_file(path, max_bytes), path);
}

JsonReader::JsonReader(json value, std::string file)
    : JsonReader(std::make_shared<const json>(std::move(value)), std::move(file), "", nullptr) {
  check(value_->is_object(), "{}: found {}, expected a JSON object", file_, describe(*value_));
}

JsonReader::JsonReader(std::shared_ptr<const json> value, std::string file, std::string path,
                       std::shared_ptr<Seen> seen)
    : value_(std::move(value)),
      file_(std::move(file)),
      path_(std::move(path)),
      seen_(seen ? std::move(seen) : std::make_shared<Seen>()) {}

std::string JsonReader::key_path(std::string_view key) const {
  return path_.empty() ? printable(key) : path_ + "." + printable(key);
}

bool JsonReader::has(std::string_view key) const {
  const auto at = value_->find(key);
  return at != value_->end() && !at->is_null();
}

std::vector<std::string> JsonReader::keys() const {
  std::vector<std::string> keys;
  for (const auto& item : value_->items()) keys.push_back(item.key());
  return keys;
}

const json* JsonReader::look(std::string_view key) const {
  seen_->keys.emplace(key);
  const auto at = value_->find(key);
  return at == value_->end() ? nullptr : &*at;
}

const json& JsonReader::require(std::string_view key, std::string_view expected) const {
  const json* value = look(key);
  if (value == nullptr) refuse(key, expected);
  return *value;
}

void JsonReader::refuse(std::string_view key, std::string_view expected) const {
  const json* value = look(key);
  const std::string found = value == nullptr ? "missing" : "found " + describe(*value);
  fail("{}: key '{}': {}, expected {}", file_, key_path(key), found, expected);
}

int64_t JsonReader::integer(std::string_view key, int64_t min, int64_t max) const {
  const std::string expected = describe_range(min, max);
  const auto number = as_integer(require(key, expected), min, max);
  if (!number) refuse(key, expected);
  return *number;
}

int64_t JsonReader::integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const {
  look(key);
  return has(key) ? integer(key, min, max) : fallback;
}

double JsonReader::number(std::string_view key, double min, double max) const {
  const std::string expected = describe_range(min, max);
  const json& value = require(key, expected);
  if (!value.is_number()) refuse(key, expected);
  const auto number = value.get<double>();
  if (!(number >= min && number <= max)) refuse(key, expected);
  return number;
}

double JsonReader::number_or(std::string_view key, double fallback, double min, double max) const {
  look(key);
  return has(key) ? number(key, min, max) : fallback;
}

bool JsonReader::boolean(std::string_view key) const {
  const json& value = require(key, "true or false");
  if (!value.is_boolean()) refuse(key, "true or false");
  return value.get<bool>();
}

bool JsonReader::boolean_or(std::string_view key, bool fallback) const {
  look(key);
  return has(key) ? boolean(key) : fallback;
}

std::string JsonReader::string(std::string_view key) const {
  const json& value = require(key, "a string");
  if (!value.is_string()) refuse(key, "a string");
  return value.get<std::string>();
}

std::string JsonReader::string_or(std::string_view key, std::string fallback) const {
  look(key);
  return has(key) ? string(key) : std::move(fallback);
}

std::string JsonReader::choice(std::string_view key, std::initializer_list<std::string_view> choices) const {
  std::string expected;
  for (std::string_view option : choices)
    expected += fmt::format("{}\"{}\"", expected.empty() ? "" : " or ", option);
  const json& value = require(key, expected);
  if (!value.is_string()) refuse(key, expected);
  for (std::string_view option : choices) {
    if (value.get_ref<const std::string&>() == option) return std::string(option);
  }
  refuse(key, expected);
}

const json& JsonReader::require_array(std::string_view key, std::string_view expected) const {
  const json& value = require(key, expected);
  if (!value.is_array()) refuse(key, expected);
  return value;
}

std::vector<int64_t> JsonReader::integers(std::string_view key, int64_t min, int64_t max) const {
  const json& array = require_array(key, "an array of integers");
  std::vector<int64_t> numbers;
  for (const json& item : array) {
    const auto number = as_integer(item, min, max);
    check(number.has_value(), "{}: key '{}[{}]': found {}, expected {}", file_, key_path(key), numbers.size(),
          describe(item), describe_range(min, max));
    numbers.push_back(*number);
  }
  return numbers;
}

std::vector<std::string> JsonReader::strings(std::string_view key) const {
  const json& array = require_array(key, "an array of strings");
  std::vector<std::string> texts;
  for (const json& item : array) {
    check(item.is_string(), "{}: key '{}[{}]': found {}, expected a string", file_, key_path(key),
          texts.size(), describe(item));
    texts.push_back(item.get<std::string>());
  }
  return texts;
}

JsonReader JsonReader::child(std::string_view key, const std::string& step, const json& value) const {
  // Asking again for the same object gives the same reader, with what was read of it before.
  if (const auto at = seen_->children.find(step); at != seen_->children.end()) return at->second;
  const std::string path = key_path(key) + step.substr(key.size());
  JsonReader reader(std::shared_ptr<const json>(value_, &value), file_, path, nullptr);
  seen_->children.emplace(step, reader);
  return reader;
}

JsonReader JsonReader::object(std::string_view key) const {
  const json& value = require(key, "an object");
  if (!value.is_object()) refuse(key, "an object");
  return child(key, std::string(key), value);
}

std::optional<JsonReader> JsonReader::optional_object(std::string_view key) const {
  look(key);
  if (!has(key)) return std::nullopt;
  return object(key);
}

std::vector<JsonReader> JsonReader::objects(std::string_view key) const {
  const json& array = require_array(key, "an array of objects");
  std::vector<JsonReader> readers;
  for (const json& item : array) {
    check(item.is_object(), "{}: key '{}[{}]': found {}, expected an object", file_, key_path(key),
          readers.size(), describe(item));
    readers.push_back(child(key, fmt::format("{}[{}]", key, readers.size()), item));
  }
  return readers;
}

const json& JsonReader::value(std::string_view key) const { return require(key, "a value"); }

void JsonReader::ignore(std::initializer_list<std::string_view> keys) const {
  for (std::string_view key : keys) look(key);
}

std::vector<std::string> JsonReader::unread_keys() const {
  std::vector<std::string> unread;
  for (const auto& item : value_->items()) {
    if (!seen_->keys.contains(item.key())) unread.push_back(key_path(item.key()));
  }
  for (const auto& [step, reader] : seen_->children) {
    for (std::string& path : reader.unread_keys()) unread.push_back(std::move(path));
  }
  return unread;
}

}  // namespace kilin::io
