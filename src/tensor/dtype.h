// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kilin {

// Element types that files hold. The plain ones carry safetensors' names; the block types are ggml's, whose
// blocks of `dtype_block` elements along the last dimension share scales (quant/formats.h has the layouts).
enum class Dtype { kF32, kF16, kBF16, kF64, kI32, kI64, kU8, kQ8_0, kQ5_0, kQ4_0, kQ4_K, kQ6_K };

struct DtypeTraits {
  std::string_view name;
  int64_t block;  // elements
  size_t block_bytes;
};

constexpr DtypeTraits dtype_traits(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return {"F32", 1, 4};
    case Dtype::kF16:
      return {"F16", 1, 2};
    case Dtype::kBF16:
      return {"BF16", 1, 2};
    case Dtype::kF64:
      return {"F64", 1, 8};
    case Dtype::kI32:
      return {"I32", 1, 4};
    case Dtype::kI64:
      return {"I64", 1, 8};
    case Dtype::kU8:
      return {"U8", 1, 1};
    case Dtype::kQ8_0:
      return {"Q8_0", 32, 34};
    case Dtype::kQ5_0:
      return {"Q5_0", 32, 22};
    case Dtype::kQ4_0:
      return {"Q4_0", 32, 18};
    case Dtype::kQ4_K:
      return {"Q4_K", 256, 144};
    case Dtype::kQ6_K:
      return {"Q6_K", 256, 210};
  }
  return {"?", 1, 0};
}

constexpr std::string_view dtype_name(Dtype dtype) { return dtype_traits(dtype).name; }
constexpr int64_t dtype_block(Dtype dtype) { return dtype_traits(dtype).block; }
constexpr bool is_quantized(Dtype dtype) { return dtype_block(dtype) > 1; }
// Bytes of one element of a plain type.
constexpr size_t dtype_size(Dtype dtype) { return is_quantized(dtype) ? 0 : dtype_traits(dtype).block_bytes; }
// Bytes of `elements` elements, a multiple of the type's block.
constexpr size_t dtype_bytes(Dtype dtype, int64_t elements) {
  return static_cast<size_t>(elements / dtype_block(dtype)) * dtype_traits(dtype).block_bytes;
}

}  // namespace kilin
