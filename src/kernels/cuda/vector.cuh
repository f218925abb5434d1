// SPDX-License-Identifier: Apache-2.0
// Device code: rows of 16-bit values, 8 or 4 at a time, as floats. The type is known at compile time.
#pragma once
#include "kernels/cuda/scalar.cuh"

namespace kilin::cuda {

template <int kCount>
struct Bits;  // kCount 16-bit values
template <>
struct Bits<8> {
  using Word = uint4;
};
template <>
struct Bits<4> {
  using Word = uint2;
};

template <CudaType kType>
__device__ __forceinline__ void unpack_word(uint32_t word, float& low, float& high) {
  if constexpr (kType == CudaType::kBf16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = both.x;
    high = both.y;
  }
}

template <CudaType kType>
__device__ __forceinline__ uint32_t pack_word(float low, float high) {
  if constexpr (kType == CudaType::kBf16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

template <CudaType kType>
__device__ __forceinline__ void unpack(const uint4& bits, float (&x)[8]) {
  unpack_word<kType>(bits.x, x[0], x[1]);
  unpack_word<kType>(bits.y, x[2], x[3]);
  unpack_word<kType>(bits.z, x[4], x[5]);
  unpack_word<kType>(bits.w, x[6], x[7]);
}

template <CudaType kType>
__device__ __forceinline__ void unpack(const uint2& bits, float (&x)[4]) {
  unpack_word<kType>(bits.x, x[0], x[1]);
  unpack_word<kType>(bits.y, x[2], x[3]);
}

template <CudaType kType>
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return {pack_word<kType>(x[0], x[1]), pack_word<kType>(x[2], x[3]), pack_word<kType>(x[4], x[5]),
          pack_word<kType>(x[6], x[7])};
}

template <CudaType kType>
__device__ __forceinline__ uint2 pack(const float (&x)[4]) {
  return {pack_word<kType>(x[0], x[1]), pack_word<kType>(x[2], x[3])};
}

}  // namespace kilin::cuda
