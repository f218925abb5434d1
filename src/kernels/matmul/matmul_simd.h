// SPDX-License-Identifier: Apache-2.0
// Activations to integers with AVX-512 and VNNI: what both kinds of blocks are made of (include only from
// files that are compiled for it).
#pragma once
#include <immintrin.h>

#include "kernels/cpu/vec.h"
#include "kernels/matmul/integers.h"

namespace kilin::KILIN_ISA {

// Whether one of 32 values is NaN or infinite.
KILIN_INLINE bool any_spoilt(Vec first, Vec second) {
  constexpr int kNanOrInfinity = 0x99;
  return (_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(first), kNanOrInfinity) |
          _mm512_fpclass_ps_mask(reinterpret_cast<__m512>(second), kNanOrInfinity)) != 0;
}

// The nearest integers, and the low bytes of 32 of them.
KILIN_INLINE __m512i rounded(Vec x) {
  return _mm512_maskz_cvtps_epi32(kAllLanes, reinterpret_cast<__m512>(x));
}
KILIN_INLINE __m256i bytes_of(__m512i first, __m512i second) {
  return _mm256_set_m128i(_mm512_maskz_cvtepi32_epi8(kAllLanes, second),
                          _mm512_maskz_cvtepi32_epi8(kAllLanes, first));
}

// The sums over the lanes 0 to 3 and 4 to 7.
KILIN_INLINE void sums_of_halves(__m256i v, int32_t (&sums)[2]) {
  v = _mm256_add_epi32(v, _mm256_shuffle_epi32(v, 0x4e));
  v = _mm256_add_epi32(v, _mm256_shuffle_epi32(v, 0xb1));
  sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(v));
  sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(v, 1));
}

// `rows` (1 to 32) results of a token. stream: past the caches, where y is aligned to lines.
KILIN_INLINE void write_row(const float (&sums)[2][16], int64_t rows, bool stream, float* y) {
  for (int64_t j = 0; j * 16 < rows; ++j) {
    const Vec sum = load(sums[j]);
    if (rows - j * 16 < 16) {
      store_part(y + j * 16, sum, static_cast<int>(rows - j * 16));
    } else if (stream) {
      _mm512_stream_ps(y + j * 16, reinterpret_cast<__m512>(sum));
    } else {
      store(y + j * 16, sum);
    }
  }
}

}  // namespace kilin::KILIN_ISA
