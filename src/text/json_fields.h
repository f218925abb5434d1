// SPDX-License-Identifier: Apache-2.0
// Fields of parsed JSON with errors that name the key, what was found and what was expected.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace kilin::text {

using Json = nlohmann::json;

// Error with the parser's own line and column.
Json parse_json(std::string_view text);

// A short form of a value for an error message.
std::string shown(const Json& value);

// `where` names the object in messages. A missing key and null are the same: nullptr, or Error where
// required.
const Json* find_field(const Json& object, std::string_view where, const char* key);
const Json& object_field(const Json& object, std::string_view where, const char* key);
const Json& array_field(const Json& object, std::string_view where, const char* key);
std::string string_field(const Json& object, std::string_view where, const char* key);
bool bool_field(const Json& object, std::string_view where, const char* key, bool otherwise);
int32_t to_id(const Json& value, std::string_view where);  // 0 .. kMaxTokenId

inline constexpr int32_t kMaxTokenId =
    (1 << 24) - 1;  // no vocabulary comes near: a larger id is a broken file

}  // namespace kilin::text
