// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::io {

constexpr size_t kMaxJsonBytes = size_t{64} << 20;
constexpr int kMaxJsonDepth = 64;

// Parses strict JSON: valid UTF-8, nothing behind the value, no key twice in an object (most parsers keep one
// of them silently), nesting up to max_depth. Errors name the file, the line and the column.
nlohmann::json parse_json(std::string_view text, const std::string& name, int max_depth = kMaxJsonDepth);
nlohmann::json parse_json_file(const std::string& path, size_t max_bytes = kMaxJsonBytes);

// Typed reading of a JSON object, for configurations. Every error names file, key, found and expected:
//   config.json: key 'linear_attn_config.head_dim': found "abc", expected an integer from 1 to 65536
// The *_or variants and optional_object() take a missing key and null alike. The reader remembers which keys
// were asked for, so that the owner of a format can refuse the ones that it does not know: see unread_keys().
class JsonReader {
 public:
  // Reads a file and keeps its content.
  static JsonReader open(const std::string& path, size_t max_bytes = kMaxJsonBytes);
  // Keeps a value that must be an object.
  JsonReader(nlohmann::json value, std::string file);

  const std::string& file() const { return file_; }
  // "linear_attn_config.head_dim"; for errors of the caller's own.
  std::string key_path(std::string_view key) const;

  bool has(std::string_view key) const;  // present and not null; does not count as reading
  std::vector<std::string> keys() const;

  int64_t integer(std::string_view key, int64_t min, int64_t max) const;
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const;
  double number(std::string_view key, double min = -kMaxNumber, double max = kMaxNumber) const;
  double number_or(std::string_view key, double fallback, double min = -kMaxNumber,
                   double max = kMaxNumber) const;
  bool boolean(std::string_view key) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  std::string string(std::string_view key) const;
  std::string string_or(std::string_view key, std::string fallback) const;
  // A string out of a fixed set.
  std::string choice(std::string_view key, std::initializer_list<std::string_view> choices) const;
  std::vector<int64_t> integers(std::string_view key, int64_t min = std::numeric_limits<int64_t>::min(),
                                int64_t max = std::numeric_limits<int64_t>::max()) const;
  std::vector<std::string> strings(std::string_view key) const;
  JsonReader object(std::string_view key) const;
  std::optional<JsonReader> optional_object(std::string_view key) const;
  std::vector<JsonReader> objects(std::string_view key) const;  // an array of objects

  // The value itself, for what the typed calls do not cover; counts as read with all that it holds.
  const nlohmann::json& value(std::string_view key) const;
  // Declares keys that are known and do not matter.
  void ignore(std::initializer_list<std::string_view> keys) const;

  // Key paths never asked for, in this object and in those that object(), optional_object() and objects()
  // opened.
  std::vector<std::string> unread_keys() const;

  // Throws the error of a key whose value the caller refuses: found ..., expected `expected`.
  [[noreturn]] void refuse(std::string_view key, std::string_view expected) const;

 private:
  static constexpr double kMaxNumber = std::numeric_limits<double>::max();
  struct Seen;

  JsonReader(std::shared_ptr<const nlohmann::json> value, std::string file, std::string path,
             std::shared_ptr<Seen> seen);
  const nlohmann::json* look(std::string_view key) const;
  const nlohmann::json& require(std::string_view key, std::string_view expected) const;
  const nlohmann::json& require_array(std::string_view key, std::string_view expected) const;
  JsonReader child(std::string_view key, const std::string& step, const nlohmann::json& value) const;

  std::shared_ptr<const nlohmann::json> value_;  // shares the ownership of the whole document
  std::string file_;
  std::string path_;            // of this object: "" or "linear_attn_config"
  std::shared_ptr<Seen> seen_;  // shared between copies of a reader
};

}  // namespace kilin::io
