// SPDX-License-Identifier: Apache-2.0
// Activations as integers of 16 bits, and the products of few tokens with them.
#include "kernels/matmul/integers_dot.h"
#if defined(__AVX512VNNI__)
#include "kernels/matmul/matmul_simd.h"
#endif

namespace kilin::KILIN_ISA {
namespace {

constexpr float kLevels = 32512.0f;  // 127 * 256: both bytes stay within -128..127

}  // namespace

#if defined(__AVX512VNNI__)

void quantize_activations(const float* x, int64_t cols, ActivationBlock* blocks) {
  for (int64_t b = 0; b < cols / 32; ++b, x += 32) {
    ActivationBlock& block = blocks[b];
    const Vec first = load(x), second = load(x + 16);
    const float largest = reduce_max(max(max(first, -first), max(second, -second)));
    if (any_spoilt(first, second)) {  // then so are the sums, and the engine tells
      block = {};
      block.scale = block.total = __builtin_nanf("");
      continue;
    }
    block.scale = largest / kLevels;
    // Too small to divide by: then the block counts as zero (below 2^-110 it moves no sum)
    const Vec factor = splat(block.scale > 0x1p-125f ? 1.0f / block.scale : 0.0f);
    const __m512i v[2] = {rounded(first * factor), rounded(second * factor)};
    const auto high_of = [](__m512i n) {
      return reinterpret_cast<__m512i>((reinterpret_cast<VecInt>(n) + 128) >> 8);
    };
    const __m256i low = bytes_of(v[0], v[1]);
    const __m256i high = bytes_of(high_of(v[0]), high_of(v[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.bytes), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.bytes + 32), high);
    const __m256i ones = _mm256_set1_epi8(1);
    const __m256i of_low = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, low);
    const __m256i of_high = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, high);
    sums_of_halves(_mm256_add_epi32(_mm256_slli_epi32(of_high, 8), of_low), block.sums);
    block.total = block.scale * static_cast<float>(block.sums[0] + block.sums[1]);
  }
}

#else

void quantize_activations(const float* x, int64_t cols, ActivationBlock* blocks) {
  for (int64_t b = 0; b < cols / 32; ++b, x += 32) {
    ActivationBlock& block = blocks[b];
    Vec most = zero();
    Vec spoilt = zero();  // NaN where an element is NaN or infinite, which max() may lose
    for (int i = 0; i < 32; i += kLanes) {
      const Vec v = load(x + i);
      most = max(most, max(v, -v));
      spoilt += v - v;
    }
    const float largest = reduce_max(most) + reduce_add(spoilt);
    if (largest != largest) {  // then so are the sums, and the engine tells
      block = {};
      block.scale = block.total = largest;
      continue;
    }
    block.scale = largest / kLevels;
    // Too small to divide by: then the block counts as zero (below 2^-110 it moves no sum)
    const float factor = block.scale > 0x1p-125f ? 1.0f / block.scale : 0.0f;
    int32_t v[32];
    for (int i = 0; i < 32; i += kLanes) {
      const Vec magic = splat(12582912.0f);  // rounds to the nearest integer
      const VecInt n = __builtin_convertvector((load(x + i) * splat(factor) + magic) - magic, VecInt);
      std::memcpy(v + i, &n, sizeof n);
    }
    for (int half = 0; half < 2; ++half) {
      int32_t sum = 0;
      for (int i = 0; i < 16; ++i) sum += v[16 * half + i];
      block.sums[half] = sum;
    }
    block.total = block.scale * static_cast<float>(block.sums[0] + block.sums[1]);
    int16_t pairs[32];
    for (int i = 0; i < 32; i += 4) {
      pairs[i] = static_cast<int16_t>(v[i]);
      pairs[i + 1] = static_cast<int16_t>(v[i + 2]);
      pairs[i + 2] = static_cast<int16_t>(v[i + 1]);
      pairs[i + 3] = static_cast<int16_t>(v[i + 3]);
    }
    std::memcpy(block.bytes, pairs, sizeof pairs);
  }
}

#endif

void dot_integers(const MatmulJob& job, PanelRange panels, const ActivationBlock* x) {
  dot_blocks(job, panels, x);
}

}  // namespace kilin::KILIN_ISA
