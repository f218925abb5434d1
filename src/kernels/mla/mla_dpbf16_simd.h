// SPDX-License-Identifier: Apache-2.0
// Private to kernels/mla, for the files compiled with AVX-512 that compute in bfloat16: rounding, the running
// softmax in powers of two.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels/mla/mla_dpbf16.h"
#include "kernels/mla/mla_simd.h"

namespace kilin::dpbf16 {

using namespace avx512;  // NOLINT: the SIMD vocabulary, compiled for this file's instruction set

// A softmax weight may grow to 2^kSlack before the row's top moves, which costs passing over its sums.
inline constexpr float kSlack = 8.0f;
inline constexpr float kHidden = -1e30f;  // score of a key that a query does not see: finite, 2^ of it is 0
inline constexpr float kLog2E = 1.44269504f;

KILIN_INLINE __m512 raw(Vec v) { return reinterpret_cast<__m512>(v); }
KILIN_INLINE __m512bh pairs_of(__m512i v) { return reinterpret_cast<__m512bh>(v); }

KILIN_INLINE __m512bh load_pairs(const uint16_t* p) { return pairs_of(_mm512_loadu_si512(p)); }
// p's two values in every lane
KILIN_INLINE __m512bh splat_pair(const uint16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return pairs_of(_mm512_set1_epi32(pair));
}
// 32 floats to bfloat16 in order
KILIN_INLINE __m512i round_pairs(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(raw(second), raw(first)));
}

// 2^x for x <= kSlack within 5e-6, 0 for very small ones: x = n + r, |r| <= 1/2, minimax polynomial in r.
KILIN_INLINE __m512 exp2_down(__m512 x) {
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = x - n;
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = p * r + _mm512_set1_ps(5.5504109e-2f);
  p = p * r + _mm512_set1_ps(2.4022651e-1f);
  p = p * r + _mm512_set1_ps(6.9314718e-1f);
  p = p * r + _mm512_set1_ps(1.0f);
  return _mm512_maskz_scalef_ps(0xffff, p, n);
}

// A row of the running softmax, in powers of two.
struct SoftmaxRow {
  float* top;       // of its scores, or up to kSlack below it
  float* sums;      // [kLanes], which add up to the sum of its weights
  float* contexts;  // [width], whole vectors: sums of weights times values
  int64_t width;
};

// The row's new top is `best`: what was summed before shrinks.
KILIN_INLINE void raise_top(float best, const SoftmaxRow& row) {
  const float correction = *row.top == kMinusInfinity ? 0.0f : exp2_down(_mm512_set1_ps(*row.top - best))[0];
  scale_row(row.width, correction, row.contexts);
  scale_row(kLanes, correction, row.sums);
  *row.top = best;
}

// One step: scores of kVectors x 16 keys times `scale`, of which the row sees the first `visible` (1 at
// least), to weights; zeros for the others. The sum is that of the weights as they are rounded.
template <int kVectors>
KILIN_INLINE void softmax_row(int64_t visible, float scale, const float* scores, const SoftmaxRow& row,
                              uint16_t* weights) {
  __m512 s[kVectors];
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) s[i] = _mm512_loadu_ps(scores + i * kLanes) * factor;
  if (visible < kVectors * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int64_t seen = visible - i * kLanes;
      const auto mask = static_cast<__mmask16>(seen >= kLanes ? 0xffff : seen <= 0 ? 0 : (1 << seen) - 1);
      s[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), mask, s[i]);
    }
  }
  Vec best = reinterpret_cast<Vec>(s[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kVectors; ++i) best = max(best, reinterpret_cast<Vec>(s[i]));
  if (_mm512_cmp_ps_mask(raw(best), _mm512_set1_ps(*row.top + kSlack), _CMP_GT_OQ) != 0) {
    raise_top(reduce_max(best), row);
  }
  const __m512 shift = _mm512_set1_ps(*row.top);
  const __m512bh ones = pairs_of(_mm512_set1_epi16(0x3f80));
  __m512 sum = _mm512_loadu_ps(row.sums);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i += 2) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(exp2_down(s[i + 1] - shift), exp2_down(s[i] - shift));
    sum = _mm512_dpbf16_ps(sum, pairs, ones);
    std::memcpy(weights + i * kLanes, &pairs, sizeof pairs);
  }
  _mm512_storeu_ps(row.sums, sum);
}

}  // namespace kilin::dpbf16
