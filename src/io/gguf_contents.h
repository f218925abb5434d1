// SPDX-License-Identifier: Apache-2.0
// Private to the implementation of GgufFile.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/gguf.h"

namespace kilin::io {

struct GgufFile::Contents {
  struct Tensor {
    TensorView view;
    std::string type;  // name of its element type
    bool readable = false;
  };

  std::string path;
  std::vector<std::string> paths;                        // of all parts
  std::vector<std::unique_ptr<const MappedFile>> files;  // none for parse()
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::map<std::string, Tensor, std::less<>> tensors;
  std::vector<std::string> names;
  uint64_t data_bytes = 0;
};

// "an integer", "an array of strings", for errors.
std::string_view kind_of(const GgufValue& value);

}  // namespace kilin::io
