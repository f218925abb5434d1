// SPDX-License-Identifier: Apache-2.0
// TOML files as configurations: every value knows where it was written, files include others, the command
// line overrides single keys, and keys that nobody asked for are found.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kilin::train {

struct TomlValue;
using TomlArray = std::vector<TomlValue>;
using TomlTable = std::map<std::string, TomlValue, std::less<>>;

struct TomlValue {
  std::variant<bool, int64_t, double, std::string, TomlArray, TomlTable> value;
  std::string origin;  // "train.toml:12" or "--set optimizer.lr"

  const TomlTable* table() const { return std::get_if<TomlTable>(&value); }
};

// Reads a file. Its key 'include' (a path or a list of them, relative to the file) names files that are read
// before it: tables are merged key by key, anything else of the later file takes the place of the earlier
// one. Throws Error naming file and line for what is no TOML, dates and times (no key takes them) and include
// cycles.
TomlTable read_toml_file(const std::string& path);
// The same of a text; `name` stands for the path in errors and includes.
TomlTable parse_toml(std::string_view text, const std::string& name);

// assignment: "optimizer.lr=1e-3". What is behind '=' is read as a TOML value, or else as the text it is, so
// that names and paths need no quotes. Throws Error when there is no '=' or a part of the key is empty or no
// table.
void set_toml(TomlTable& root, std::string_view assignment);

// {"optimizer.lr": "0.001", ...}: every value of the tree as TOML text, to compare two configurations.
std::map<std::string, std::string> flatten_toml(const TomlTable& root);

// Typed reading, the counterpart of io::JsonReader. Errors name the line, the key, found and expected:
//   train.toml:7: key 'optimizer.lr': found "fast", expected a number from 0 to 10
class TomlReader {
 public:
  TomlReader(const TomlTable& root, std::string file);

  const std::string& file() const { return file_; }
  std::string key_path(std::string_view key) const;
  // "train.toml:7", or the file alone where the key is missing.
  std::string place(std::string_view key) const;
  bool has(std::string_view key) const;
  std::vector<std::string> keys() const;

  int64_t integer(std::string_view key, int64_t min, int64_t max) const;
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const;
  double number_or(std::string_view key, double fallback, double min, double max) const;
  double number(std::string_view key, double min, double max) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  std::string string(std::string_view key) const;
  std::string string_or(std::string_view key, std::string fallback) const;
  std::string choice_or(std::string_view key, std::string_view fallback,
                        std::initializer_list<std::string_view> choices) const;
  // A string or a list of strings; empty when the key is missing.
  std::vector<std::string> strings(std::string_view key) const;
  // A list of integers; empty when the key is missing.
  std::vector<int64_t> integers(std::string_view key, int64_t min, int64_t max) const;
  // A table; a reader of nothing when the key is missing.
  TomlReader section(std::string_view key) const;
  // The value itself, counted as read with all that it holds; nullptr when the key is missing.
  const TomlValue* value(std::string_view key) const;

  // Throws Error for the first key, in the order of the tree, that was never asked for.
  void refuse_unknown() const;
  // Throws the error of a key whose value the caller refuses.
  [[noreturn]] void refuse(std::string_view key, std::string_view expected) const;

 private:
  struct Seen;
  TomlReader(const TomlTable* table, std::string file, std::string path, std::shared_ptr<Seen> seen);
  const TomlValue* look(std::string_view key) const;
  void refuse_unknown(const TomlTable& table, const std::string& path) const;

  const TomlTable* table_;  // nullptr: a section that is not there
  std::string file_;
  std::string path_;
  std::shared_ptr<Seen> seen_;
};

}  // namespace kilin::train
