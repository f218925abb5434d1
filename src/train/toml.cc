// SPDX-License-Identifier: Apache-2.0
#include "train/toml.h"

#include <toml++/toml.h>

#include <filesystem>
#include <optional>
#include <utility>

#include "base/error.h"
#include "io/mapped_file.h"
#include "io/printable.h"

namespace kilin::train {
namespace {

constexpr int kMaxIncludeDepth = 8;
constexpr size_t kMaxTomlBytes = size_t{4} << 20;

std::string origin_of(const toml::node& node, const std::string& name) {
  return fmt::format("{}:{}", name, node.source().begin.line);
}

TomlTable convert_table(const toml::table& table, const std::string& name);

TomlValue convert(const toml::node& node, const std::string& key, const std::string& name) {
  TomlValue result{false, origin_of(node, name)};
  if (const auto* table = node.as_table()) {
    result.value = convert_table(*table, name);
  } else if (const auto* array = node.as_array()) {
    TomlArray items;
    for (const toml::node& item : *array) items.push_back(convert(item, key, name));
    result.value = std::move(items);
  } else if (const auto* text = node.as_string()) {
    result.value = text->get();
  } else if (const auto* integer = node.as_integer()) {
    result.value = integer->get();
  } else if (const auto* number = node.as_floating_point()) {
    result.value = number->get();
  } else if (const auto* boolean = node.as_boolean()) {
    result.value = boolean->get();
  } else {
    fail("{}: key '{}': found a date or a time, which no key takes", result.origin, io::printable(key));
  }
  return result;
}

TomlTable convert_table(const toml::table& table, const std::string& name) {
  TomlTable result;
  for (const auto& [key, node] : table) {
    result.emplace(std::string(key.str()), convert(node, std::string(key.str()), name));
  }
  return result;
}

toml::table parse(std::string_view text, const std::string& name) {
  try {
    return toml::parse(text, name);
  } catch (const toml::parse_error& error) {
    fail("{}:{}:{}: {}", name, error.source().begin.line, error.source().begin.column,
         io::printable(std::string(error.description())));
  }
}

// Keys of `later` win.
void merge(TomlTable& into, TomlTable&& later) {
  for (auto& [key, value] : later) {
    const auto found = into.find(key);
    if (found != into.end() && found->second.table() != nullptr && value.table() != nullptr) {
      merge(std::get<TomlTable>(found->second.value), std::get<TomlTable>(std::move(value.value)));
      found->second.origin = value.origin;
    } else {
      into.insert_or_assign(key, std::move(value));
    }
  }
}

TomlTable read_with_includes(const std::string& path, int depth, const std::string& included_from);

TomlTable resolve_includes(TomlTable own, const std::string& name, int depth) {
  const auto found = own.find("include");
  if (found == own.end()) return own;
  const TomlValue include = std::move(found->second);
  own.erase(found);
  TomlArray files;
  if (const auto* list = std::get_if<TomlArray>(&include.value)) {
    files = *list;
  } else {
    files.push_back(include);
  }
  TomlTable result;
  for (const TomlValue& file : files) {
    const auto* text = std::get_if<std::string>(&file.value);
    check(text != nullptr, "{}: key 'include': expected a path or a list of paths", include.origin);
    const std::filesystem::path path = std::filesystem::path(name).parent_path() / *text;
    merge(result, read_with_includes(path.string(), depth + 1, include.origin));
  }
  merge(result, std::move(own));
  return result;
}

TomlTable read_with_includes(const std::string& path, int depth, const std::string& included_from) {
  check(depth <= kMaxIncludeDepth, "{}: key 'include': more than {} files deep (do they include each other?)",
        included_from, kMaxIncludeDepth);
  try {
    const io::MappedFile file(path);
    check(file.bytes().size() <= kMaxTomlBytes, "{}: found {} bytes, expected at most {}", path,
          file.bytes().size(), kMaxTomlBytes);
    return resolve_includes(convert_table(parse(file.text(), path), path), path, depth);
  } catch (const Error& error) {
    const std::string what = error.what();
    if (included_from.empty() || what.find("include") != std::string::npos || !what.starts_with(path + ": "))
      throw;
    fail("{}: key 'include': {}", included_from, what);
  }
}

std::string text_of(const TomlValue& value) {
  struct Text {
    std::string operator()(bool x) const { return x ? "true" : "false"; }
    std::string operator()(int64_t x) const { return fmt::format("{}", x); }
    std::string operator()(double x) const { return fmt::format("{}", x); }
    std::string operator()(const std::string& x) const { return fmt::format("\"{}\"", io::printable(x)); }
    std::string operator()(const TomlArray& x) const {
      std::string text = "[";
      for (size_t i = 0; i < x.size(); ++i) text += (i > 0 ? ", " : "") + text_of(x[i]);
      return text + "]";
    }
    std::string operator()(const TomlTable&) const { return "a table"; }
  };
  return std::visit(Text{}, value.value);
}

void flatten(const TomlTable& table, const std::string& path, std::map<std::string, std::string>& out) {
  for (const auto& [key, value] : table) {
    const std::string name = path.empty() ? key : fmt::format("{}.{}", path, key);
    if (const TomlTable* inner = value.table()) {
      flatten(*inner, name, out);
    } else {
      out[name] = text_of(value);
    }
  }
}

std::string range_text(const char* what, double min, double max) {
  const bool open = max >= 1e15;
  return open ? fmt::format("{} from {:g}", what, min) : fmt::format("{} from {:g} to {:g}", what, min, max);
}

}  // namespace

TomlTable parse_toml(std::string_view text, const std::string& name) {
  return resolve_includes(convert_table(parse(text, name), name), name, 0);
}

TomlTable read_toml_file(const std::string& path) { return read_with_includes(path, 0, ""); }

void set_toml(TomlTable& root, std::string_view assignment) {
  const size_t equals = assignment.find('=');
  check(equals != std::string_view::npos && equals > 0, "--set {}: expected SECTION.KEY=VALUE",
        io::printable(std::string(assignment)));
  const std::string path(assignment.substr(0, equals));
  const std::string text(assignment.substr(equals + 1));
  const std::string origin = "--set " + io::printable(path);
  TomlValue value{text, origin};
  try {
    // What a path or a name would be read as by accident ("1e3" is a number, "a.b" none) is the user's wish.
    const toml::table parsed = toml::parse("value = " + text);
    if (parsed.size() == 1) value = convert(*parsed.get("value"), path, origin);
  } catch (const toml::parse_error&) {
    // a bare word: the text itself
  }
  value.origin = origin;
  TomlTable* table = &root;
  size_t begin = 0;
  while (true) {
    const size_t dot = path.find('.', begin);
    const std::string part = path.substr(begin, dot == std::string::npos ? dot : dot - begin);
    check(!part.empty(), "{}: expected SECTION.KEY=VALUE", origin);
    if (dot == std::string::npos) {
      table->insert_or_assign(part, std::move(value));
      return;
    }
    auto& inner = table->try_emplace(part, TomlValue{TomlTable{}, origin}).first->second;
    table = std::get_if<TomlTable>(&inner.value);
    check(table != nullptr, "{}: '{}' is no section ({})", origin, part, inner.origin);
    begin = dot + 1;
  }
}

std::map<std::string, std::string> flatten_toml(const TomlTable& root) {
  std::map<std::string, std::string> result;
  flatten(root, "", result);
  return result;
}

// Key paths that were asked for; per table path the keys, for the hint of an unknown one.
struct TomlReader::Seen {
  std::map<std::string, std::set<std::string, std::less<>>, std::less<>> keys;
  std::set<std::string, std::less<>> whole;  // tables read through value()
};

TomlReader::TomlReader(const TomlTable& root, std::string file)
    : TomlReader(&root, std::move(file), "", std::make_shared<Seen>()) {}

TomlReader::TomlReader(const TomlTable* table, std::string file, std::string path, std::shared_ptr<Seen> seen)
    : table_(table), file_(std::move(file)), path_(std::move(path)), seen_(std::move(seen)) {}

std::string TomlReader::key_path(std::string_view key) const {
  return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
}

const TomlValue* TomlReader::look(std::string_view key) const {
  seen_->keys[path_].insert(std::string(key));
  if (table_ == nullptr) return nullptr;
  const auto found = table_->find(key);
  return found == table_->end() ? nullptr : &found->second;
}

bool TomlReader::has(std::string_view key) const {
  return table_ != nullptr && table_->find(key) != table_->end();
}

std::vector<std::string> TomlReader::keys() const {
  std::vector<std::string> result;
  if (table_ != nullptr) {
    for (const auto& [key, value] : *table_) result.push_back(key);
  }
  return result;
}

std::string TomlReader::place(std::string_view key) const {
  return has(key) ? table_->find(key)->second.origin : file_;
}

void TomlReader::refuse(std::string_view key, std::string_view expected) const {
  const TomlValue* found = look(key);
  if (found == nullptr) fail("{}: key '{}' is missing, expected {}", file_, key_path(key), expected);
  fail("{}: key '{}': found {}, expected {}", found->origin, key_path(key), text_of(*found), expected);
}

int64_t TomlReader::integer(std::string_view key, int64_t min, int64_t max) const {
  const TomlValue* found = look(key);
  const auto* value = found != nullptr ? std::get_if<int64_t>(&found->value) : nullptr;
  if (value == nullptr || *value < min || *value > max) {
    refuse(key, max == std::numeric_limits<int64_t>::max()
                    ? fmt::format("a whole number from {}", min)
                    : fmt::format("a whole number from {} to {}", min, max));
  }
  return *value;
}

int64_t TomlReader::integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const {
  return look(key) == nullptr ? fallback : integer(key, min, max);
}

double TomlReader::number(std::string_view key, double min, double max) const {
  const TomlValue* found = look(key);
  std::optional<double> value;
  if (found != nullptr) {
    if (const auto* x = std::get_if<double>(&found->value)) value = *x;
    if (const auto* x = std::get_if<int64_t>(&found->value)) value = static_cast<double>(*x);
  }
  if (!value || !(*value >= min && *value <= max)) refuse(key, range_text("a number", min, max));
  return *value;
}

double TomlReader::number_or(std::string_view key, double fallback, double min, double max) const {
  return look(key) == nullptr ? fallback : number(key, min, max);
}

bool TomlReader::boolean_or(std::string_view key, bool fallback) const {
  const TomlValue* found = look(key);
  if (found == nullptr) return fallback;
  const auto* value = std::get_if<bool>(&found->value);
  if (value == nullptr) refuse(key, "true or false");
  return *value;
}

std::string TomlReader::string(std::string_view key) const {
  const TomlValue* found = look(key);
  const auto* value = found != nullptr ? std::get_if<std::string>(&found->value) : nullptr;
  if (value == nullptr || value->empty()) refuse(key, "a text in quotes");
  return *value;
}

std::string TomlReader::string_or(std::string_view key, std::string fallback) const {
  return look(key) == nullptr ? std::move(fallback) : string(key);
}

std::string TomlReader::choice_or(std::string_view key, std::string_view fallback,
                                  std::initializer_list<std::string_view> choices) const {
  const TomlValue* found = look(key);
  if (found == nullptr) return std::string(fallback);
  const auto* value = std::get_if<std::string>(&found->value);
  std::string expected;
  for (const std::string_view choice : choices) {
    if (value != nullptr && *value == choice) return *value;
    expected += fmt::format("{}\"{}\"", expected.empty() ? "" : " or ", choice);
  }
  refuse(key, expected);
}

std::vector<std::string> TomlReader::strings(std::string_view key) const {
  const TomlValue* found = look(key);
  if (found == nullptr) return {};
  if (const auto* one = std::get_if<std::string>(&found->value)) return {*one};
  const auto* list = std::get_if<TomlArray>(&found->value);
  if (list == nullptr) refuse(key, "a text or a list of texts");
  std::vector<std::string> result;
  for (const TomlValue& item : *list) {
    const auto* text = std::get_if<std::string>(&item.value);
    if (text == nullptr) refuse(key, "a text or a list of texts");
    result.push_back(*text);
  }
  return result;
}

std::vector<int64_t> TomlReader::integers(std::string_view key, int64_t min, int64_t max) const {
  const TomlValue* found = look(key);
  if (found == nullptr) return {};
  const std::string expected = fmt::format("a list of integers from {} to {}", min, max);
  const auto* list = std::get_if<TomlArray>(&found->value);
  if (list == nullptr) refuse(key, expected);
  std::vector<int64_t> result;
  for (const TomlValue& item : *list) {
    const auto* number = std::get_if<int64_t>(&item.value);
    if (number == nullptr || *number < min || *number > max) refuse(key, expected);
    result.push_back(*number);
  }
  return result;
}

TomlReader TomlReader::section(std::string_view key) const {
  const TomlValue* found = look(key);
  if (found != nullptr && found->table() == nullptr) refuse(key, "a section, [" + key_path(key) + "]");
  return {found != nullptr ? found->table() : nullptr, file_, key_path(key), seen_};
}

const TomlValue* TomlReader::value(std::string_view key) const {
  const TomlValue* found = look(key);
  if (found != nullptr && found->table() != nullptr) seen_->whole.insert(key_path(key));
  return found;
}

void TomlReader::refuse_unknown(const TomlTable& table, const std::string& path) const {
  const auto asked = seen_->keys.find(path);
  for (const auto& [key, value] : table) {
    const std::string name = path.empty() ? key : fmt::format("{}.{}", path, key);
    if (asked == seen_->keys.end() || asked->second.find(key) == asked->second.end()) {
      std::string known;
      if (asked != seen_->keys.end()) {
        for (const std::string& other : asked->second) known += (known.empty() ? "" : ", ") + other;
      }
      fail("{}: key '{}' is unknown (known {}: {})", value.origin, io::printable(name),
           path.empty() ? "at the top" : fmt::format("in [{}]", path), known);
    }
    if (value.table() != nullptr && seen_->whole.find(name) == seen_->whole.end())
      refuse_unknown(*value.table(), name);
  }
}

void TomlReader::refuse_unknown() const {
  if (table_ != nullptr) refuse_unknown(*table_, path_);
}

}  // namespace kilin::train
