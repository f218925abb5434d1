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

typedef uint8_t VecBytes __attribute__((vector_size(kLanes)));
typedef int8_t VecSignedBytes __attribute__((vector_size(kLanes)));

KILIN_INLINE VecUint load_unit(const void* p) {
  VecUint v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// kLanes bytes as floats
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

KILIN_INLINE int32_t load_i32(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if defined(__AVX512VNNI__)

// Sums of products with the low and with the high bytes of the activations.
struct Dot {
  VecInt low, high;
};
KILIN_INLINE Dot dot_start(int32_t offset) { return {VecInt{} + offset, VecInt{}}; }
// sum += w_j v_(4 group + j) over the four unsigned bytes w_j of each lane
KILIN_INLINE void dot_group(Dot& sum, VecUint w, const ActivationBlock& x, int group) {
  const auto bytes = reinterpret_cast<__m512i>(w);
  const __m512i low = _mm512_set1_epi32(load_i32(x.bytes + 4 * group));
  const __m512i high = _mm512_set1_epi32(load_i32(x.bytes + 32 + 4 * group));
  sum.low = reinterpret_cast<VecInt>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum.low), bytes, low));
  sum.high = reinterpret_cast<VecInt>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum.high), bytes, high));
}
// |sum| <= 32 * 255 * 32,512 fits an int32
KILIN_INLINE Vec dot_end(const Dot& sum) { return __builtin_convertvector((sum.high << 8) + sum.low, Vec); }

#else

struct Dot {
  VecInt sum;
};
KILIN_INLINE Dot dot_start(int32_t offset) { return {VecInt{} + offset}; }

#if defined(__AVX2__)
KILIN_INLINE void dot_group(Dot& sum, VecUint w, const ActivationBlock& x, int group) {
  const __m256i even = reinterpret_cast<__m256i>(w & 0x00ff00ffu);
  const __m256i odd = reinterpret_cast<__m256i>((w >> 8) & 0x00ff00ffu);
  const __m256i x_even = _mm256_set1_epi32(load_i32(x.bytes + 8 * group));
  const __m256i x_odd = _mm256_set1_epi32(load_i32(x.bytes + 8 * group + 4));
  sum.sum += reinterpret_cast<VecInt>(_mm256_madd_epi16(even, x_even));
  sum.sum += reinterpret_cast<VecInt>(_mm256_madd_epi16(odd, x_odd));
}
#else
KILIN_INLINE void dot_group(Dot& sum, VecUint w, const ActivationBlock& x, int group) {
  int16_t v[4];
  std::memcpy(v, x.bytes + 8 * group, sizeof v);
  sum.sum += reinterpret_cast<VecInt>(w & 255u) * v[0] + reinterpret_cast<VecInt>((w >> 16) & 255u) * v[1] +
             reinterpret_cast<VecInt>((w >> 8) & 255u) * v[2] + reinterpret_cast<VecInt>(w >> 24) * v[3];
}
#endif
KILIN_INLINE Vec dot_end(const Dot& sum) { return __builtin_convertvector(sum.sum, Vec); }

#endif

}  // namespace kilin::KILIN_ISA
