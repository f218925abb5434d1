// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tensor/dtype.h"

namespace kilin {

using Shape = std::vector<int64_t>;

inline int64_t element_count(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

// "[3, 4]"
inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Read-only, row-major data owned by somebody else (a mapped file, mostly). `data` need not be aligned. Of a
// quantised tensor the last dimension is a multiple of the type's block.
struct TensorView {
  Dtype dtype = Dtype::kF32;
  Shape shape;
  const void* data = nullptr;

  int64_t elements() const { return element_count(shape); }
  size_t bytes() const { return dtype_bytes(dtype, elements()); }
};

}  // namespace kilin
