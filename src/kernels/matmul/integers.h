// SPDX-License-Identifier: Apache-2.0
// Products of 4-byte groups, and loads of integers: what dot_integers and the AVX-512 forms are made of
// (include only from files that are compiled for an instruction set).
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/cpu/vec.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::KILIN_ISA {

inline constexpr int kParts = 16 / kLanes;  // vectors that hold a unit of 16 rows

#if defined(__AVX512F__)
// gcc 12 warns of an uninitialised value inside the forms without a mask
inline constexpr __mmask16 kAllLanes = 0xffff;
#endif

KILIN_INLINE VecUint load_unit(const void* p) {
  VecUint v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// kLanes bytes as floats. With the instructions themselves: gcc 12 takes a __builtin_convertvector of bytes
// apart, byte by byte.
#if defined(__AVX512F__)
KILIN_INLINE __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
KILIN_INLINE Vec load_u8(const void* p) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepu8_epi32(kAllLanes, load_bytes(p))));
}
KILIN_INLINE Vec load_i8(const void* p) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, load_bytes(p))));
}
#elif defined(__AVX2__)
KILIN_INLINE __m128i load_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
KILIN_INLINE Vec load_u8(const void* p) {
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_bytes(p))));
}
KILIN_INLINE Vec load_i8(const void* p) {
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(p))));
}
#else
typedef uint8_t VecBytes __attribute__((vector_size(kLanes)));
typedef int8_t VecSignedBytes __attribute__((vector_size(kLanes)));
KILIN_INLINE Vec load_u8(const void* p) {
  VecBytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, VecInt), Vec);
}
KILIN_INLINE Vec load_i8(const void* p) {
  VecSignedBytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, VecInt), Vec);
}
#endif

KILIN_INLINE int32_t load_i32(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// The sum over a block of 32 columns of w_c v_c, w_c unsigned bytes of each lane, v_c activations that all
// lanes share. dot_add: the four columns of a group, whose weights are the four bytes of each lane of w.
template <class Block>
struct BlockDot;

#if defined(__AVX512VNNI__)

KILIN_INLINE VecInt dot_bytes(VecInt sum, VecUint w, const int8_t* four) {
  return reinterpret_cast<VecInt>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w), _mm512_set1_epi32(load_i32(four))));
}

template <>
struct BlockDot<ActivationBlock> {
  VecInt low, high;  // with the low and with the high bytes of the activations
};
KILIN_INLINE void dot_start(BlockDot<ActivationBlock>& dot, int32_t offset) {
  dot.low = VecInt{} + offset;
  dot.high = VecInt{};
}
KILIN_INLINE void dot_add(BlockDot<ActivationBlock>& dot, VecUint w, const ActivationBlock& x, int group) {
  dot.low = dot_bytes(dot.low, w, x.bytes + 4 * group);
  dot.high = dot_bytes(dot.high, w, x.bytes + 32 + 4 * group);
}
// |sum| <= 32 * 255 * 32,512 fits an int32
KILIN_INLINE Vec dot_end(const BlockDot<ActivationBlock>& dot) {
  return __builtin_convertvector((dot.high << 8) + dot.low, Vec);
}

template <>
struct BlockDot<ByteBlock> {
  VecInt sum;
};
KILIN_INLINE void dot_start(BlockDot<ByteBlock>& dot, int32_t offset) { dot.sum = VecInt{} + offset; }
KILIN_INLINE void dot_add(BlockDot<ByteBlock>& dot, VecUint w, const ByteBlock& x, int group) {
  dot.sum = dot_bytes(dot.sum, w, x.bytes + 4 * group);
}
KILIN_INLINE Vec dot_end(const BlockDot<ByteBlock>& dot) { return __builtin_convertvector(dot.sum, Vec); }

#else

template <>
struct BlockDot<ActivationBlock> {
  VecInt sum;
};
KILIN_INLINE void dot_start(BlockDot<ActivationBlock>& dot, int32_t offset) { dot.sum = VecInt{} + offset; }
#if defined(__AVX2__)
KILIN_INLINE void dot_add(BlockDot<ActivationBlock>& dot, VecUint w, const ActivationBlock& x, int group) {
  const __m256i even = reinterpret_cast<__m256i>(w & 0x00ff00ffu);
  const __m256i odd = reinterpret_cast<__m256i>((w >> 8) & 0x00ff00ffu);
  const __m256i x_even = _mm256_set1_epi32(load_i32(x.bytes + 8 * group));
  const __m256i x_odd = _mm256_set1_epi32(load_i32(x.bytes + 8 * group + 4));
  dot.sum += reinterpret_cast<VecInt>(_mm256_madd_epi16(even, x_even));
  dot.sum += reinterpret_cast<VecInt>(_mm256_madd_epi16(odd, x_odd));
}
#else
KILIN_INLINE void dot_add(BlockDot<ActivationBlock>& dot, VecUint w, const ActivationBlock& x, int group) {
  int16_t v[4];
  std::memcpy(v, x.bytes + 8 * group, sizeof v);
  dot.sum += reinterpret_cast<VecInt>(w & 255u) * v[0] + reinterpret_cast<VecInt>((w >> 16) & 255u) * v[1] +
             reinterpret_cast<VecInt>((w >> 8) & 255u) * v[2] + reinterpret_cast<VecInt>(w >> 24) * v[3];
}
#endif
KILIN_INLINE Vec dot_end(const BlockDot<ActivationBlock>& dot) {
  return __builtin_convertvector(dot.sum, Vec);
}

#endif

}  // namespace kilin::KILIN_ISA
