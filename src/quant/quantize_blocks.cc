// SPDX-License-Identifier: Apache-2.0
#include "quant/quantize_blocks.h"

#include <cmath>

#include "base/error.h"

namespace kilin::quant {

namespace {

// The nearest integer, halves away from zero. |x| < 2^31.
inline int32_t round_away(float x) {
  const auto whole = static_cast<int32_t>(x);
  const float rest = x - static_cast<float>(whole);  // exact
  return whole + (rest >= 0.5f ? 1 : 0) - (rest <= -0.5f ? 1 : 0);
}

// 1 / d; 0 for the zero block, and where the quotient overflows: d is then far below the least float16, so
// the stored scale is 0 and the elements do not matter.
inline float inverse(float d) {
  const float inverse = d == 0 ? 0 : 1 / d;
  return std::isfinite(inverse) ? inverse : 0;
}

}  // namespace

uint16_t float16_scale(float scale) {
  const uint16_t bits = to_float16(scale).bits;
  if ((bits & 0x7c00) == 0x7c00) fail("a block's scale {} overflows float16 (65504)", scale);
  return bits;
}

BlockQ8_0 quantize_q8_0(const float* x) {
  float largest = 0;
  for (int i = 0; i < 32; ++i) {
    const float magnitude = std::fabs(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float d = largest / 127;
  const float scale = inverse(d);
  BlockQ8_0 block{};
  block.d = float16_scale(d);
  for (int i = 0; i < 32; ++i) block.q[i] = static_cast<int8_t>(round_away(x[i] * scale));
  return block;
}

// The element of largest magnitude (the first of them) becomes n = 0, that is -8 d: d takes its sign.
BlockQ4_0 quantize_q4_0(const float* x) {
  // Both signs' extremes, then the first of the larger magnitude: without a branch in the loop.
  float highest = 0;
  float lowest = 0;
  for (int i = 0; i < 32; ++i) {
    highest = x[i] > highest ? x[i] : highest;
    lowest = x[i] < lowest ? x[i] : lowest;
  }
  float extreme = highest > -lowest ? highest : lowest;
  if (highest == -lowest) {
    for (int i = 0; i < 32; ++i) {
      if (std::fabs(x[i]) == highest) {
        extreme = highest == 0 ? 0 : x[i];
        break;
      }
    }
  }
  const float d = extreme / -8;
  const float scale = inverse(d);
  BlockQ4_0 block{};
  block.d = float16_scale(d);
  if (d != 0 && scale == 0) return block;
  uint8_t n[32];
  for (int i = 0; i < 32; ++i) {
    const auto level = static_cast<int32_t>(x[i] * scale + 8.5f);  // in [0, 16]
    n[i] = static_cast<uint8_t>(level < 15 ? level : 15);
  }
  for (int j = 0; j < 16; ++j) block.q[j] = static_cast<uint8_t>(n[j] | n[j + 16] << 4);
  return block;
}

}  // namespace kilin::quant
