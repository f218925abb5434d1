// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <map>
#include <span>
#include <string>

#include "tensor/tensor_view.h"

namespace kilin::io {

struct NamedTensor {
  std::string name;
  TensorView view;  // data may be null only when there are no elements
};

// Writes PATH whole or not at all (see AtomicFile). Tensors are laid out by falling element size, then by
// name, and the header is padded to 8 bytes, so that every tensor is aligned to its element in a mapping.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace kilin::io
