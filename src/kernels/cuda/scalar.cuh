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

// Element i of an array whose type is known at run time (the same for all threads, so the branch is free), in
// two steps where what comes between must not wait for the load.
__device__ __forceinline__ uint32_t load_bits(const void* data, CudaType type, int64_t i) {
  if (type == CudaType::kF32) return static_cast<const uint32_t*>(data)[i];
  return static_cast<const uint16_t*>(data)[i];
}
__device__ __forceinline__ float float_of_bits(uint32_t bits, CudaType type) {
  if (type == CudaType::kF32) return __uint_as_float(bits);
  return from_bits(static_cast<uint16_t>(bits), type);
}
__device__ __forceinline__ float load(const void* data, CudaType type, int64_t i) {
  return float_of_bits(load_bits(data, type, i), type);
}

__device__ __forceinline__ void store(void* data, CudaType type, int64_t i, float value) {
  if (type == CudaType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = to_bits(value, type);
  }
}

// Elements i and i + 1 of states (CudaStates), i even.
__device__ __forceinline__ float2 load_pair(const void* data, CudaType type, int64_t i) {
  if (type == CudaType::kF32) return *reinterpret_cast<const float2*>(static_cast<const float*>(data) + i);
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(data) + i);
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

__device__ __forceinline__ void store_pair(void* data, CudaType type, int64_t i, float2 x) {
  if (type == CudaType::kF32) {
    *reinterpret_cast<float2*>(static_cast<float*>(data) + i) = x;
  } else {
    *reinterpret_cast<__nv_bfloat162*>(static_cast<uint16_t*>(data) + i) = __floats2bfloat162_rn(x.x, x.y);
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
  const bool is_wide = type == CudaType::kF32;
  RawValue raw;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.b32 p, %3, 0;\n setp.ne.b32 q, %4, 0;\n mov.b32 %0, 0;\n mov.b32 %1, "
      "0;\n"
      " @p ld.global.b32 %0, [%2];\n @q ld.global.u16 %1, [%2];\n}"
      : "=&r"(raw.wide), "=&r"(raw.narrow)
      : "l"(static_cast<const char*>(data) + i * (is_wide ? 4 : 2)), "r"(static_cast<int>(there && is_wide)),
        "r"(static_cast<int>(there && !is_wide))
      : "memory");
  return raw;
}

// Four values of one type: 16-bit ones in low, or two floats in each.
struct RawFour {
  uint2 low, high;
  __device__ __forceinline__ float4 value(CudaType type) const {
    if (type == CudaType::kF32) {
      return {__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x),
              __uint_as_float(high.y)};
    }
    return {from_bits(low.x & 0xffff, type), from_bits(low.x >> 16, type), from_bits(low.y & 0xffff, type),
            from_bits(low.y >> 16, type)};
  }
};

// Row i of an array [rows][4], which is aligned to 32 bits; with a stride, column i of an array [4][stride]
// of floats.
__device__ __forceinline__ RawFour issue_4(const void* data, CudaType type, int64_t i, int64_t stride,
                                           bool there) {
  const bool wide = type == CudaType::kF32;
  const uint32_t* words = static_cast<const uint32_t*>(data) + i * (stride != 0 ? 1 : wide ? 4 : 2);
  const int64_t step = stride != 0 ? stride : 1;
  RawFour four;
  four.low.x = issue_32(words, 0, there);
  four.low.y = issue_32(words, step, there);
  four.high.x = issue_32(words, 2 * step, there && wide);
  four.high.y = issue_32(words, 3 * step, there && wide);
  return four;
}

// The sum over kLanes neighbouring lanes (a power of two), which all of them get; the whole warp calls it.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// 1 / (1 + e^-x): e^-x may be infinite, the quotient is then 0.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

}  // namespace kilin::cuda
