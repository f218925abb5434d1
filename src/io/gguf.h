// SPDX-License-Identifier: Apache-2.0
// GGUF files (ggml's container: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3,
// little-endian: a table of typed key-values, a table of tensors, aligned data.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "io/mapped_file.h"
#include "tensor/tensor_view.h"

namespace kilin::io {

// Integers of every width widen to int64 (uint64 above 2^63 - 1 is an Error), both float widths to double.
using GgufArray =
    std::variant<std::vector<int64_t>, std::vector<double>, std::vector<std::string>, std::vector<bool>>;
using GgufValue = std::variant<int64_t, double, bool, std::string, GgufArray>;

// One GGUF file, or all parts of a split one, checked in full when opened: every count, length, offset and
// type before it is used. Copies share the mapping; the views live as long as one of them.
class GgufFile {
 public:
  // The path of a split file's first part (NAME-00001-of-0000N.gguf) opens all parts, expected beside it, as
  // one: the metadata of the first, the tensors of all.
  static GgufFile open(const std::string& path);
  // Parses bytes that the caller keeps alive; `name` stands for the path in errors. One part of a split file
  // is taken as it is.
  static GgufFile parse(std::span<const std::byte> bytes, std::string name);
  // Whether the file starts with GGUF's magic; false for anything that cannot be read.
  static bool is_gguf(const std::string& path);

  // Shapes are row-major, slowest first: the reverse of ggml's `ne`. Every dimension is at least 1; a tensor
  // without dimensions is a scalar. A tensor of a type that Kilin does not read (Q5_K, IQ4_XS, ...) is
  // listed, but asking for it is an Error that names the type. Views are aligned to general.alignment in
  // their file.
  const TensorView* find(std::string_view name) const;  // nullptr when there is none
  bool contains(std::string_view name) const;
  const std::vector<std::string>& names() const;  // in the order of the file
  // Name of a tensor's element type ("Q4_K", "IQ4_XS"), also of types that find() refuses; "type 99" of one
  // that this reader does not know. An Error when there is no such tensor.
  std::string_view type_name(std::string_view name) const;

  bool has(std::string_view key) const;
  // The value of a key. An Error that names file, key, found and expected type when it is missing or of
  // another type; the optional forms return the default when it is missing (still an Error for another type).
  // get_double takes integers too.
  int64_t get_int(std::string_view key) const;
  int64_t get_int(std::string_view key, int64_t fallback) const;
  double get_double(std::string_view key) const;
  double get_double(std::string_view key, double fallback) const;
  bool get_bool(std::string_view key, bool fallback) const;
  const std::string& get_string(std::string_view key) const;
  std::string get_string(std::string_view key, std::string_view fallback) const;
  const std::vector<int64_t>& get_ints(std::string_view key) const;
  const std::vector<double>& get_doubles(std::string_view key) const;
  const std::vector<std::string>& get_strings(std::string_view key) const;
  const std::map<std::string, GgufValue, std::less<>>& metadata() const;

  const std::string& path() const;         // of the first part
  std::vector<std::string> files() const;  // of all parts
  uint64_t data_bytes() const;             // of all tensors whose type has a known size
  void advise(Access access) const;

 private:
  class Parser;
  struct Contents;
  explicit GgufFile(std::shared_ptr<const Contents> contents);
  const GgufValue* value(std::string_view key) const;
  template <class T>
  const T& get(std::string_view key, std::string_view expected) const;

  std::shared_ptr<const Contents> contents_;
};

}  // namespace kilin::io
