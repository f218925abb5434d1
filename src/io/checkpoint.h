// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "io/gguf.h"
#include "io/safetensors.h"

namespace kilin::io {

// The weights of a model: a Hugging Face directory (`model.safetensors`, or shards that
// `model.safetensors.index.json` lists), a single .safetensors file, or a GGUF file (of a split one the first
// part). Opening checks every file and that the index and the shards agree. Views live as long as the
// checkpoint or a copy of it.
class Checkpoint {
 public:
  static Checkpoint open(const std::string& path);

  const TensorView* find(std::string_view name) const;  // nullptr when there is none
  const TensorView& get(std::string_view name) const;   // an Error when there is none

  bool contains(std::string_view name) const { return file_of_.find(name) != file_of_.end(); }
  const std::vector<std::string>& names() const { return names_; }  // sorted
  std::vector<std::string> files() const;                           // paths, in order of their names
  const std::string& path() const { return path_; }
  uint64_t total_bytes() const;  // of all tensors
  const GgufFile* gguf() const;  // nullptr for safetensors; its metadata has config and tokenizer
  void advise(Access access) const;

 private:
  using File = std::variant<SafetensorsFile, GgufFile>;

  Checkpoint() = default;
  void add_file(File file);
  void add_shards(const std::string& directory, const std::string& index_path);

  std::string path_;
  std::vector<File> files_;
  std::map<std::string, size_t, std::less<>> file_of_;
  std::vector<std::string> names_;
};

}  // namespace kilin::io
