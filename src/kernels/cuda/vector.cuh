// SPDX-License-Identifier: Apache-2.0
// Device code: rows of 16-bit values, 8 or 4 at a time, as floats. The type is known at compile time.
#pragma once
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
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
using ElementOf = std::conditional_t<kType == CudaType::kBf16, __nv_bfloat16, __half>;

template <CudaType kType>
__device__ __forceinline__ void unpack_word(uint32_t word, float& low, float& high) {
  const float2 both = unpack<ElementOf<kType>>(word);
  low = both.x;
  high = both.y;
}

template <CudaType kType>
__device__ __forceinline__ uint32_t pack_word(float low, float high) {
  return pack<ElementOf<kType>>(low, high);
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
