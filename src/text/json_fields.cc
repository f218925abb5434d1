// SPDX-License-Identifier: Apache-2.0
#include "text/json_fields.h"

#include "base/error.h"
#include "text/utf8.h"

namespace kilin::text {

Json parse_json(std::string_view text) {
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    fail("not JSON: {}", lossy_utf8(error.what()));
  }
}

std::string shown(const Json& value) {
  constexpr size_t kLongest = 80;
  if (value.is_structured()) return fmt::format("{} of {}", value.type_name(), value.size());
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

const Json* find_field(const Json& object, std::string_view where, const char* key) {
  if (!object.is_object()) fail("{} is {}, expected an object", where, shown(object));
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

namespace {

const Json& typed_field(const Json& object, std::string_view where, const char* key, Json::value_t type,
                        const char* expected) {
  const Json* value = find_field(object, where, key);
  check(value != nullptr, "{}.{} is missing, expected {}", where, key, expected);
  if (value->type() != type) fail("{}.{} is {}, expected {}", where, key, shown(*value), expected);
  return *value;
}

}  // namespace

const Json& object_field(const Json& object, std::string_view where, const char* key) {
  return typed_field(object, where, key, Json::value_t::object, "an object");
}

const Json& array_field(const Json& object, std::string_view where, const char* key) {
  return typed_field(object, where, key, Json::value_t::array, "an array");
}

std::string string_field(const Json& object, std::string_view where, const char* key) {
  return typed_field(object, where, key, Json::value_t::string, "a string").get<std::string>();
}

bool bool_field(const Json& object, std::string_view where, const char* key, bool otherwise) {
  const Json* value = find_field(object, where, key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) fail("{}.{} is {}, expected true or false", where, key, shown(*value));
  return value->get<bool>();
}

int32_t to_id(const Json& value, std::string_view where) {
  const bool in_range =
      value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(kMaxTokenId);
  if (!in_range) fail("{} is {}, expected a token id from 0 to {}", where, shown(value), kMaxTokenId);
  return value.get<int32_t>();
}

}  // namespace kilin::text
