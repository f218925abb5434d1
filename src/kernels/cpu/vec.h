// SPDX-License-Identifier: Apache-2.0
// The SIMD vocabulary of the CPU kernels: one text for every instruction set, over the compiler's vector
// types. The width follows from the flags the file is compiled with (cmake/isa.cmake); a*b+c contracts to FMA
// where there is one. Everything lives in an ISA namespace, so that copies compiled with different flags
// never meet.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef KILIN_ISA
#error "compile this through kilin_isa_sources()"
#endif

namespace kilin::KILIN_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalfBits __attribute__((vector_size(kLanes * 2)));

#define KILIN_INLINE static inline __attribute__((always_inline))

KILIN_INLINE Vec splat(float x) { return x - Vec{}; }
KILIN_INLINE Vec zero() { return Vec{}; }

KILIN_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KILIN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// n in [0, kLanes] floats, the rest of the lanes zero / left alone in memory
KILIN_INLINE Vec load_part(const float* p, int n) {
  Vec v{};
  std::memcpy(&v, p, static_cast<unsigned>(n) * 4u);
  return v;
}
KILIN_INLINE void store_part(float* p, Vec v, int n) { std::memcpy(p, &v, static_cast<unsigned>(n) * 4u); }

// kLanes IEEE half values widened exactly (subnormals, infinities and NaN included), and kLanes floats
// rounded to the nearest half, ties to even, beyond 65,519 to infinity. Without the instructions: the half's
// exponent and mantissa bits, read as a float, are 2^-112 times the value, and one exact multiplication moves
// them back; the other way round adding half an ulp of the half carries into the right bits.
#if defined(__AVX512F__)
KILIN_INLINE Vec load_f16(const void* p) {
  // the forms with a mask: gcc 12 warns of an uninitialised value inside those without
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
}
KILIN_INLINE void store_f16(void* p, Vec v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
KILIN_INLINE Vec load_f16(const void* p) {
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
KILIN_INLINE void store_f16(void* p, Vec v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
KILIN_INLINE Vec load_f16(const void* p) {
  VecHalfBits h;
  std::memcpy(&h, p, sizeof h);
  const VecUint u = __builtin_convertvector(h, VecUint);
  const VecUint magnitude = (u & 0x7fffu) << 13;
  const VecUint scaled = reinterpret_cast<VecUint>(reinterpret_cast<Vec>(magnitude) * splat(0x1p112f));
  const VecUint special = static_cast<VecUint>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Vec>(scaled | special | ((u & 0x8000u) << 16));
}
KILIN_INLINE void store_f16(void* p, Vec v) {
  const VecUint u = reinterpret_cast<VecUint>(v);
  const VecUint a = u & 0x7fffffffu;
  const VecUint normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // below 2^-14: adding 0.5 lets the addition round at bit 2^-24
  const Vec shifted = reinterpret_cast<Vec>(a) + splat(0.5f);
  const VecUint subnormal = reinterpret_cast<VecUint>(shifted) - 0x3f000000u;
  VecUint h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? (VecUint{} + 0x7c00u) : h;
  h = a > 0x7f800000u ? (VecUint{} + 0x7e00u) : h;
  const VecHalfBits bits = __builtin_convertvector(h | ((u >> 16) & 0x8000u), VecHalfBits);
  std::memcpy(p, &bits, sizeof bits);
}
#endif

KILIN_INLINE Vec load_bf16(const void* p) {
  VecHalfBits h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, VecUint) << 16);
}

// n in [0, kLanes] halves, the rest of the lanes zero / left alone in memory
KILIN_INLINE Vec load_f16_part(const void* p, int n) {
  VecHalfBits h{};
  std::memcpy(&h, p, static_cast<unsigned>(n) * 2u);
  return load_f16(&h);
}
KILIN_INLINE void store_f16_part(void* p, Vec v, int n) {
  VecHalfBits h;
  store_f16(&h, v);
  std::memcpy(p, &h, static_cast<unsigned>(n) * 2u);
}

KILIN_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
KILIN_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

// Lanes of a (0 to kLanes - 1) and b (kLanes on) by a constant index; gcc and clang spell it differently.
KILIN_INLINE Vec shuffle2(Vec a, Vec b, VecInt index) {
#if defined(__clang__)
  Vec r{};
  for (int i = 0; i < kLanes; ++i) r[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// a0 b0 a1 b1 ... of the lower and of the upper halves of two vectors
KILIN_INLINE Vec interleave_low(Vec a, Vec b) {
  VecInt index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i / 2 + i % 2 * kLanes;
  return shuffle2(a, b, index);
}
KILIN_INLINE Vec interleave_high(Vec a, Vec b) {
  VecInt index{};
  for (int i = 0; i < kLanes; ++i) index[i] = kLanes / 2 + i / 2 + i % 2 * kLanes;
  return shuffle2(a, b, index);
}

// Transposes kLanes x kLanes floats: log2(kLanes) perfect shuffles of the rows.
KILIN_INLINE void transpose(Vec (&rows)[kLanes]) {
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// v with lanes i and i ^ kWidth exchanged
template <int kWidth>
KILIN_INLINE Vec swap_lanes(Vec v) {
  VecInt index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ kWidth;
  return shuffle2(v, v, index);
}

template <int kWidth = kLanes / 2>
KILIN_INLINE float reduce_add(Vec v) {
  if constexpr (kWidth > 0) {
    return reduce_add<kWidth / 2>(v + swap_lanes<kWidth>(v));
  } else {
    return v[0];
  }
}

template <int kWidth = kLanes / 2>
KILIN_INLINE float reduce_max(Vec v) {
  if constexpr (kWidth > 0) {
    return reduce_max<kWidth / 2>(max(v, swap_lanes<kWidth>(v)));
  } else {
    return v[0];
  }
}

// e^x within 2 ulp for x in [-87.3, 88.7]; 0 below -87.3 (so that e^-inf = 0 and no subnormal arithmetic
// happens), infinity above 88.7; NaN stays NaN. Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, degree-6
// Taylor-minimax.
KILIN_INLINE Vec exp(Vec x) {
  const Vec clamped = max(min(x, splat(88.72283f)), splat(-87.33654f));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = clamped * splat(1.44269504f) + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  // 2^n in two factors, so that n = 128 does not overflow before the multiplication
  const VecInt exponent = __builtin_convertvector(n, VecInt);
  const VecInt half = exponent >> 1;
  const Vec scale1 = reinterpret_cast<Vec>((half + 127) << 23);
  const Vec scale2 = reinterpret_cast<Vec>((exponent - half + 127) << 23);
  Vec y = p * scale1 * scale2;
  y = x < splat(-87.33654f) ? zero() : y;
  y = x > splat(88.72283f) ? splat(__builtin_inff()) : y;
  return x == x ? y : x;
}

KILIN_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }
KILIN_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// ln(1 + y) for y in [0, 1], within 3 ulp: 2 atanh(y / (2 + y)), argument at most 1/3
KILIN_INLINE Vec log1p_unit(Vec y) {
  const Vec s = y / (y + splat(2.0f));
  const Vec z = s * s;
  Vec p = splat(1.0f / 15.0f);
  p = p * z + splat(1.0f / 13.0f);
  p = p * z + splat(1.0f / 11.0f);
  p = p * z + splat(1.0f / 9.0f);
  p = p * z + splat(1.0f / 7.0f);
  p = p * z + splat(1.0f / 5.0f);
  p = p * z + splat(1.0f / 3.0f);
  return splat(2.0f) * (p * z * s + s);
}

// ln(1 + e^x), linear above 20 as in torch: max(x, 0) + ln(1 + e^-|x|)
KILIN_INLINE Vec softplus(Vec x) {
  const Vec magnitude = max(x, -x);
  const Vec soft = max(x, zero()) + log1p_unit(exp(-magnitude));
  return x > splat(20.0f) ? x : soft;
}

}  // namespace kilin::KILIN_ISA
