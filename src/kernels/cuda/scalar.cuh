// SPDX-License-Identifier: Apache-2.0
// Device code: values of the three activation types as float, and the functions of gates.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/types.h"

namespace kilin::cuda {

__device__ __forceinline__ float from_bits(uint16_t bits, CudaType type) {
  return type == CudaType::kBf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                 : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t to_bits(float value, CudaType type) {
  return type == CudaType::kBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                 : __half_as_ushort(__float2half_rn(value));
}

// Element i of an array whose type is known at run time (the same for all threads, so the branch is free).
__device__ __forceinline__ float load(const void* data, CudaType type, int64_t i) {
  if (type == CudaType::kF32) return static_cast<const float*>(data)[i];
  return from_bits(static_cast<const uint16_t*>(data)[i], type);
}

__device__ __forceinline__ void store(void* data, CudaType type, int64_t i, float value) {
  if (type == CudaType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = to_bits(value, type);
  }
}

// Loads that are only issued: predicated instead of branched around, and converted when the value is used. A
// branch or a conversion between two loads would make the second wait for the first (about 600 ns from
// memory).
struct RawValue {  // one of the two is 0
  uint32_t wide, narrow;
  __device__ __forceinline__ float value(CudaType type) const {
    return type == CudaType::kF32 ? __uint_as_float(wide) : from_bits(static_cast<uint16_t>(narrow), type);
  }
};

__device__ __forceinline__ uint32_t issue_16(const void* data, int64_t i, bool there) {
  uint32_t bits;
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n mov.b32 %0, 0;\n @p ld.global.u16 %0, [%1];\n}"
               : "=r"(bits)
               : "l"(static_cast<const uint16_t*>(data) + i), "r"(static_cast<int>(there))
               : "memory");
  return bits;
}

__device__ __forceinline__ uint32_t issue_32(const void* data, int64_t i, bool there) {
  uint32_t bits;
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n mov.b32 %0, 0;\n @p ld.global.b32 %0, [%1];\n}"
               : "=r"(bits)
               : "l"(static_cast<const uint32_t*>(data) + i), "r"(static_cast<int>(there))
               : "memory");
  return bits;
}

__device__ __forceinline__ RawValue issue(const void* data, CudaType type, int64_t i, bool there) {
  return {issue_32(data, i, there && type == CudaType::kF32),
          issue_16(data, i, there && type != CudaType::kF32)};
}

// Elements 4 i .. 4 i + 3 of an array that is aligned to four of its elements.
struct RawFour {
  uint2 low, high;  // four 16-bit values in low, or two floats in each
  __device__ __forceinline__ float4 value(CudaType type) const {
    if (type == CudaType::kF32) {
      return {__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x),
              __uint_as_float(high.y)};
    }
    return {from_bits(low.x & 0xffff, type), from_bits(low.x >> 16, type), from_bits(low.y & 0xffff, type),
            from_bits(low.y >> 16, type)};
  }
};

__device__ __forceinline__ uint2 issue_64(const void* address, bool there) {
  uint2 bits;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %3, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n"
      " @p ld.global.v2.b32 {%0, %1}, [%2];\n}"
      : "=r"(bits.x), "=r"(bits.y)
      : "l"(address), "r"(static_cast<int>(there))
      : "memory");
  return bits;
}

__device__ __forceinline__ RawFour issue_4(const void* data, CudaType type, int64_t i, bool there) {
  const bool wide = type == CudaType::kF32;
  const uint2* address = static_cast<const uint2*>(data) + (wide ? 2 * i : i);
  return {issue_64(address, there), issue_64(address + 1, there && wide)};
}

// 1 / (1 + e^-x): e^-x may be infinite, the quotient is then 0.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

}  // namespace kilin::cuda
