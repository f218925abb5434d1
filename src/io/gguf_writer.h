// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/tensor_view.h"

namespace kilin::io {

// Writes a GGUF v3 file: first the metadata and the table of tensors, then their data piece by piece in the
// order of the table, so that a model larger than memory can be converted. The file appears whole or not at
// all (io/atomic_file.h). Used out of order, with a wrong number of bytes or a repeated name, it throws.
class GgufWriter {
 public:
  explicit GgufWriter(std::string path);
  ~GgufWriter();

  // Metadata, in this order in the file. The integer and float widths are those that ggml's own tools write
  // for the keys of llama.cpp (uint32, float32, int32 arrays).
  void add_uint32(std::string_view key, uint32_t value);
  void add_float32(std::string_view key, float value);
  void add_bool(std::string_view key, bool value);
  void add_string(std::string_view key, std::string_view value);
  void add_int32s(std::string_view key, const std::vector<int32_t>& values);
  void add_float32s(std::string_view key, const std::vector<float>& values);
  void add_strings(std::string_view key, const std::vector<std::string>& values);

  // Declares a tensor; shape row-major (the file holds it reversed). All before the first write().
  void add_tensor(std::string name, Dtype dtype, Shape shape);
  // The data of the next tensor, or a further part of it.
  void write(const void* data, size_t size);
  uint64_t data_bytes() const;  // of all declared tensors
  // Every declared byte must have been written.
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kilin::io
