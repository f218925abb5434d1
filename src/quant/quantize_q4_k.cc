// SPDX-License-Identifier: Apache-2.0
// Q4_K: per part of 32 elements a scale s and a minimum m with x_i ~ s n_i - m, n_i in [0, 15], that make
//   E = sum_i w_i (s n_i - m - x_i)^2,   w_i = rms(x) + |x_i|
// small. For a guess of the step the levels n_i follow by rounding; for given levels the best (s, m) is a
// weighted straight line, in closed form. The search tries 21 guesses, (max - min) / (14 + k/10), and keeps
// the best line. Then the 8 scales and the 8 minima are rounded to 6 bits of their largest, and the levels
// chosen anew for what was stored.
// The eight parts of a block run side by side, one per vector lane: every sum is taken over the elements in
// their order, which gives ggml's reference results to the bit.
#include <cmath>
#include <limits>

#include "base/error.h"
#include "quant/quantize_blocks.h"

namespace kilin::quant {

namespace {

constexpr int kParts = 8;
constexpr int kElements = 32;  // of a part
constexpr int kLevels = 15;
constexpr int kGuesses = 21;

using Lane = float[kParts];

// The nearest integer of v clamped to [0, 15] (halves to even); 0 for NaN. Adding and taking away 1.5 2^23
// leaves no fraction bits.
inline float nearest_level(float v) {
  v = v > 0.0f ? v : 0.0f;
  v = v < 15.0f ? v : 15.0f;
  constexpr float kNoFraction = 12582912.0f;
  return (v + kNoFraction) - kNoFraction;
}

struct Block {
  float x[kElements][kParts];
  float weight[kElements][kParts];
  Lane lowest, highest;    // of each part; lowest <= 0
  Lane sum_w, sum_x;       // sum w, sum w x
  Lane scale, minus_m;     // the best line so far: x ~ scale n + minus_m
  Lane error;              // its E
  Lane guess, guess_base;  // its levels: nearest_level(guess (x - guess_base))
};

void load(const float* x, Block& b) {
  for (int p = 0; p < kParts; ++p) {
    for (int i = 0; i < kElements; ++i) b.x[i][p] = x[kElements * p + i];
  }
  Lane squares = {};
  for (int p = 0; p < kParts; ++p) {
    b.lowest[p] = b.highest[p] = b.x[0][p];
    b.sum_w[p] = b.sum_x[p] = 0;
  }
  for (auto& row : b.x) {
    for (int p = 0; p < kParts; ++p) squares[p] += row[p] * row[p];
  }
  for (float& square : squares) square = std::sqrt(square / kElements);
  for (int i = 0; i < kElements; ++i) {
    for (int p = 0; p < kParts; ++p) {
      const float v = b.x[i][p];
      const float w = squares[p] + std::fabs(v);
      b.weight[i][p] = w;
      b.lowest[p] = v < b.lowest[p] ? v : b.lowest[p];
      b.highest[p] = v > b.highest[p] ? v : b.highest[p];
      b.sum_w[p] += w;
      b.sum_x[p] += w * v;
    }
  }
  for (float& low : b.lowest) low = low > 0 ? 0 : low;
}

// E of the line (scale, offset) on the levels of a guess.
void line_error(const Block& b, const Lane& guess, const Lane& base, const Lane& scale, const Lane& offset,
                Lane& error) {
  Lane sum = {};
  for (int i = 0; i < kElements; ++i) {
    for (int p = 0; p < kParts; ++p) {
      const float n = nearest_level(guess[p] * (b.x[i][p] - base[p]));
      const float difference = scale[p] * n + offset[p] - b.x[i][p];
      sum[p] += b.weight[i][p] * (difference * difference);
    }
  }
  for (int p = 0; p < kParts; ++p) error[p] = sum[p];
}

struct LevelSums {
  Lane n, nn, nx;  // sum w n, sum w n^2, sum w n x
};

void level_sums(const Block& b, const Lane& guess, LevelSums& sums) {
  LevelSums s = {};
  for (int i = 0; i < kElements; ++i) {
    for (int p = 0; p < kParts; ++p) {
      const float n = nearest_level(guess[p] * (b.x[i][p] - b.minus_m[p]));
      const float wn = b.weight[i][p] * n;
      s.n[p] += wn;
      s.nn[p] += wn * n;
      s.nx[p] += wn * b.x[i][p];
    }
  }
  sums = s;
}

// Finite, or 0: a part so narrow that levels / range overflows has no levels to speak of (its scale will be 0
// in float16).
inline float finite_or_zero(float x) { return std::fabs(x) <= std::numeric_limits<float>::max() ? x : 0; }

void first_line(Block& b) {
  for (int p = 0; p < kParts; ++p) {
    const float guess = kLevels / (b.highest[p] - b.lowest[p]);
    b.scale[p] = 1 / guess;
    b.minus_m[p] = b.guess_base[p] = b.lowest[p];
    b.guess[p] = finite_or_zero(guess);
  }
  line_error(b, b.guess, b.guess_base, b.scale, b.minus_m, b.error);
}

void try_guess(int k, Block& b) {
  // The range is that of the best line so far: its offset may have left the lowest element.
  Lane guess;
  for (int p = 0; p < kParts; ++p) {
    guess[p] =
        finite_or_zero((-1.0f + 0.1f * static_cast<float>(k) + kLevels) / (b.highest[p] - b.minus_m[p]));
  }
  LevelSums s;
  level_sums(b, guess, s);
  Lane scale;
  Lane offset;
  Lane determinant;
  for (int p = 0; p < kParts; ++p) {
    determinant[p] = b.sum_w[p] * s.nn[p] - s.n[p] * s.n[p];
    scale[p] = (b.sum_w[p] * s.nx[p] - b.sum_x[p] * s.n[p]) / determinant[p];
    offset[p] = (s.nn[p] * b.sum_x[p] - s.n[p] * s.nx[p]) / determinant[p];
    if (offset[p] > 0) {  // the format subtracts its minimum: no positive offset; a line through 0 instead
      offset[p] = 0;
      scale[p] = s.nx[p] / s.nn[p];
    }
  }
  Lane error;
  line_error(b, guess, b.minus_m, scale, offset, error);
  for (int p = 0; p < kParts; ++p) {
    if (!(determinant[p] > 0 && error[p] < b.error[p])) continue;
    b.error[p] = error[p];
    b.guess[p] = guess[p];
    b.guess_base[p] = b.minus_m[p];
    b.scale[p] = scale[p];
    b.minus_m[p] = offset[p];
  }
}

// 6-bit integers q_p = round(v_p / step) with the step of the largest; returns the step.
float round_to_6_bits(const Lane& values, uint8_t (&q)[kParts]) {
  float largest = 0;
  for (const float v : values) largest = v > largest ? v : largest;
  const float inverse = finite_or_zero(largest > 0 ? 63 / largest : 0);
  for (int p = 0; p < kParts; ++p) {
    const float v = inverse * values[p];
    q[p] = static_cast<uint8_t>(std::nearbyint(v > 0 ? (v < 63 ? v : 63) : 0));
  }
  return largest / 63;
}

// The inverse of scale_min().
void pack_scales(const uint8_t (&s)[kParts], const uint8_t (&m)[kParts], uint8_t (&packed)[12]) {
  for (int p = 0; p < 4; ++p) {
    packed[p] = static_cast<uint8_t>(s[p] | s[p + 4] >> 4 << 6);
    packed[p + 4] = static_cast<uint8_t>(m[p] | m[p + 4] >> 4 << 6);
    packed[p + 8] = static_cast<uint8_t>((s[p + 4] & 15) | (m[p + 4] & 15) << 4);
  }
}

}  // namespace

BlockQ4_K quantize_q4_k(const float* x) {
  Block b;
  load(x, b);
  for (int p = 0; p < kParts; ++p) {
    // Beyond this no line can have a scale or a minimum in float16's range, and the sums above may overflow.
    if (b.highest[p] > 1e9f || b.lowest[p] < -1e9f)
      fail("a block of Q4_K holds {}: float16 scales overflow",
           b.highest[p] > 1e9f ? b.highest[p] : b.lowest[p]);
  }
  first_line(b);
  for (int k = 0; k < kGuesses; ++k) try_guess(k, b);

  uint8_t scales[kParts];
  uint8_t minima[kParts];
  Lane m;
  for (int p = 0; p < kParts; ++p) m[p] = -b.minus_m[p];
  BlockQ4_K block{};
  block.d = float16_scale(round_to_6_bits(b.scale, scales));
  block.dmin = float16_scale(round_to_6_bits(m, minima));
  pack_scales(scales, minima, block.scales);

  const float d = to_float(Float16{block.d});
  const float dmin = to_float(Float16{block.dmin});
  for (int p = 0; p < kParts; ++p) {
    const float scale = d * static_cast<float>(scales[p]);
    const float minimum = dmin * static_cast<float>(minima[p]);
    for (int i = 0; i < kElements; ++i) {
      // With a stored scale of 0 levels make no difference; the search's stay, as in ggml's files.
      const float level =
          scale != 0 ? (b.x[i][p] + minimum) / scale : b.guess[p] * (b.x[i][p] - b.guess_base[p]);
      block.q[32 * (p / 2) + i] |=
          static_cast<uint8_t>(static_cast<uint8_t>(nearest_level(level)) << (p % 2 * 4));
    }
  }
  return block;
}

}  // namespace kilin::quant
