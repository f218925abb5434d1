// SPDX-License-Identifier: Apache-2.0
// Numbers of the GGUF format: the types of metadata values and the element types of tensors.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "tensor/dtype.h"

namespace kilin::io {

inline constexpr std::string_view kGgufMagic = "GGUF";
inline constexpr uint32_t kGgufVersion = 3;  // what Kilin writes; 2 differs only in allowing no big-endian
inline constexpr std::string_view kGgufAlignmentKey = "general.alignment";
inline constexpr uint64_t kGgufAlignment = 32;  // of tensor data where that key is missing
inline constexpr size_t kGgmlMaxDims = 4;

// Of metadata values (enum gguf_type of ggml's gguf.h).
enum class GgufType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

// Of tensors (enum ggml_type of ggml.h): blocks of `block` elements take `block_bytes` bytes. Types that ggml
// has removed have no size any more. `dtype` where Kilin can hold the type.
struct GgmlType {
  uint32_t id;
  std::string_view name;
  int64_t block;
  size_t block_bytes;
  std::optional<Dtype> dtype = std::nullopt;
};

inline constexpr std::array<GgmlType, 43> kGgmlTypes = {{
    {0, "F32", 1, 4, Dtype::kF32},
    {1, "F16", 1, 2, Dtype::kF16},
    {2, "Q4_0", 32, 18, Dtype::kQ4_0},
    {3, "Q4_1", 32, 20},
    {4, "Q4_2 (removed)", 1, 0},
    {5, "Q4_3 (removed)", 1, 0},
    {6, "Q5_0", 32, 22, Dtype::kQ5_0},
    {7, "Q5_1", 32, 24},
    {8, "Q8_0", 32, 34, Dtype::kQ8_0},
    {9, "Q8_1", 32, 36},
    {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},
    {12, "Q4_K", 256, 144, Dtype::kQ4_K},
    {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210, Dtype::kQ6_K},
    {15, "Q8_K", 256, 292},
    {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98},
    {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},
    {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136},
    {24, "I8", 1, 1},
    {25, "I16", 1, 2},
    {26, "I32", 1, 4, Dtype::kI32},
    {27, "I64", 1, 8, Dtype::kI64},
    {28, "F64", 1, 8, Dtype::kF64},
    {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2, Dtype::kBF16},
    {31, "Q4_0_4_4 (removed)", 1, 0},
    {32, "Q4_0_4_8 (removed)", 1, 0},
    {33, "Q4_0_8_8 (removed)", 1, 0},
    {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},
    {36, "IQ4_NL_4_4 (removed)", 1, 0},
    {37, "IQ4_NL_4_8 (removed)", 1, 0},
    {38, "IQ4_NL_8_8 (removed)", 1, 0},
    {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},
    {41, "Q1_0", 128, 18},
    {42, "Q2_0", 64, 18},
}};

constexpr bool ggml_types_are_in_order() {
  for (size_t i = 0; i < kGgmlTypes.size(); ++i) {
    const GgmlType& type = kGgmlTypes[i];
    if (type.id != i) return false;
    if (type.dtype &&
        (dtype_traits(*type.dtype).name != type.name || dtype_traits(*type.dtype).block != type.block ||
         dtype_traits(*type.dtype).block_bytes != type.block_bytes))
      return false;
  }
  return true;
}
static_assert(ggml_types_are_in_order());

}  // namespace kilin::io
