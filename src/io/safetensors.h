// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/mapped_file.h"
#include "tensor/tensor_view.h"

namespace kilin::io {

constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;  // the limit of the format's own reader

// One .safetensors file, checked in full when opened: 8 bytes of header length, a JSON header, then the data
// of all tensors without gap or overlap. Copies share the mapping; the views live as long as one of them.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path);
  // Parses bytes that the caller keeps alive; `name` stands for the path in errors.
  static SafetensorsFile parse(std::span<const std::byte> bytes, std::string name);

  // The tensor, or nullptr when the file has none of that name. A tensor of an element type that Kilin does
  // not compute with (F8_E4M3, BOOL, ...) is listed, but asking for it is an Error.
  const TensorView* find(std::string_view name) const;
  // As find(), but a missing tensor is an Error.
  const TensorView& get(std::string_view name) const;

  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  const std::vector<std::string>& names() const { return names_; }  // in the order of the data
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  uint64_t data_bytes() const { return data_bytes_; }  // of all tensors
  void advise(Access access) const;

 private:
  struct Entry {
    TensorView view;
    std::string unsupported;  // the element type's name when TensorView cannot hold it
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  class Parser;

  SafetensorsFile() = default;

  std::string path_;
  std::shared_ptr<const MappedFile> file_;  // null for parse()
  std::map<std::string, Entry, std::less<>> tensors_;
  std::vector<std::string> names_;
  std::map<std::string, std::string> metadata_;
  uint64_t data_bytes_ = 0;
};

}  // namespace kilin::io
