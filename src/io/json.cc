// SPDX-License-Identifier: Apache-2.0
#include "io/json.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "io/mapped_file.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

using nlohmann::json;

// Walks over the text and tells how far the lexer has read: SAX events carry no position of their own.
class TrackingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  TrackingIterator(const char* at, const char** furthest) : at_(at), furthest_(furthest) {}
  reference operator*() const { return *at_; }
  TrackingIterator& operator++() {
    *furthest_ = ++at_;
    return *this;
  }
  TrackingIterator operator++(int) {
    TrackingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const TrackingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const TrackingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  const char** furthest_;
};

// Builds the value as nlohmann's own DOM parser would, but refuses a key that comes twice and deep nesting.
class StrictBuilder : public json::json_sax_t {
 public:
  StrictBuilder(std::string_view text, const std::string& name, int max_depth)
      : text_(text), name_(name), max_depth_(max_depth), furthest_(text.data()) {}

  json parse() {
    const char* begin = text_.data();
    json::sax_parse(TrackingIterator(begin, &furthest_), TrackingIterator(begin + text_.size(), &furthest_),
                    this);
    return std::move(root_);
  }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t& value) override { return add(std::move(value)); }

  bool start_object(std::size_t) override { return open(json::object()); }
  bool start_array(std::size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& key) override {
    auto& object = open_.back()->get_ref<json::object_t&>();
    const auto [at, inserted] = object.emplace(key, nullptr);
    if (!inserted) fail_here(fmt::format("key '{}' comes twice in the same object", printable(key)));
    slot_ = &at->second;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ...": the place is
    // ours.
    std::string_view what = error.what();
    for (std::string_view mark : {"] ", "column "}) {
      if (const size_t at = what.find(mark); at != what.npos) what.remove_prefix(at + mark.size());
      if (mark == "column ")
        what.remove_prefix(std::min(what.size(), what.find_first_not_of("0123456789: ")));
    }
    fail_here(printable(what, 200));
  }

 private:
  [[noreturn]] void fail_here(const std::string& what) const {
    // The column of the last byte read, counted in bytes from 1.
    const auto read = static_cast<size_t>(furthest_ - text_.data());
    const std::string_view before = text_.substr(0, read == 0 ? 0 : read - 1);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const size_t column = before.size() - (before.rfind('\n') + 1) + 1;  // npos + 1 is 0
    fail("{}: line {}, column {}: {}", name_, line, column, what);
  }

  json* place(json&& value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& array = open_.back()->get_ref<json::array_t&>();
      array.push_back(std::move(value));
      return &array.back();
    }
    *slot_ = std::move(value);
    return slot_;
  }
  bool add(json&& value) {
    place(std::move(value));
    return true;
  }
  bool open(json&& empty) {
    if (std::cmp_greater_equal(open_.size(), max_depth_)) {
      fail_here(
          fmt::format("found nesting deeper than {} levels, expected at most {}", max_depth_, max_depth_));
    }
    open_.push_back(place(std::move(empty)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& name_;
  int max_depth_;
  const char* furthest_;
  json root_;
  json* slot_ = nullptr;     // where the value of the last key goes
  std::vector<json*> open_;  // the containers being filled; only the innermost grows, so the pointers hold
};

}  // namespace

json parse_json(std::string_view text, const std::string& name, int max_depth) {
  // nlohmann takes a NUL byte for the end of the input and would not see what follows.
  const size_t nul = text.find('\0');
  check(nul == text.npos, "{}: found a NUL byte at offset {}, expected JSON text", name, nul);
  return StrictBuilder(text, name, max_depth).parse();
}

json parse_json_file(const std::string& path, size_t max_bytes) {
  const MappedFile file(path);
  check(file.bytes().size() <= max_bytes, "{}: found {} bytes, expected at most {} bytes of JSON", path,
        file.bytes().size(), max_bytes);
  return parse_json(file.text(), path);
}

}  // namespace kilin::io
