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

// One number of each part. The compiler makes of it what vectors the machine has.
using Lane [[gnu::vector_size(kParts * sizeof(float))]] = float;

inline Lane same(float v) { return Lane{} + v; }

// The nearest integer of v clamped to [0, 15] (halves to even); 0 for NaN. Adding and taking away 1.5 2^23
// leaves no fraction bits.
inline Lane nearest_level(Lane v) {
  v = v > 0.0f ? v : same(0.0f);
  v = v < 15.0f ? v : same(15.0f);
  constexpr float kNoFraction = 12582912.0f;
  return (v + kNoFraction) - kNoFraction;
}

struct Block {
  Lane x[kElements];
  Lane weight[kElements];
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
  Lane rms = {};
  for (const Lane& v : b.x) rms += v * v;
  for (int p = 0; p < kParts; ++p) rms[p] = std::sqrt(rms[p] / kElements);
  b.lowest = b.highest = b.x[0];
  b.sum_w = b.sum_x = Lane{};
  for (int i = 0; i < kElements; ++i) {
    const Lane v = b.x[i];
    const Lane w = rms + (v < 0.0f ? -v : v);
    b.weight[i] = w;
    b.lowest = v < b.lowest ? v : b.lowest;
    b.highest = v > b.highest ? v : b.highest;
    b.sum_w += w;
    b.sum_x += w * v;
  }
  b.lowest = b.lowest > 0.0f ? same(0.0f) : b.lowest;
}

using Levels = Lane[kElements];

void levels_of(const Block& b, const Lane& guess, const Lane& base, Levels& levels) {
  for (int i = 0; i < kElements; ++i) levels[i] = nearest_level(guess * (b.x[i] - base));
}

// E of the line (scale, offset) on these levels.
Lane line_error(const Block& b, const Levels& levels, const Lane& scale, const Lane& offset) {
  Lane sum = {};
  for (int i = 0; i < kElements; ++i) {
    const Lane difference = scale * levels[i] + offset - b.x[i];
    sum += b.weight[i] * (difference * difference);
  }
  return sum;
}

struct LevelSums {
  Lane n = {}, nn = {}, nx = {};  // sum w n, sum w n^2, sum w n x
};

LevelSums level_sums(const Block& b, const Levels& levels) {
  LevelSums s;
  for (int i = 0; i < kElements; ++i) {
    const Lane wn = b.weight[i] * levels[i];
    s.n += wn;
    s.nn += wn * levels[i];
    s.nx += wn * b.x[i];
  }
  return s;
}

// Finite, or 0: a part so narrow that levels / range overflows has no levels to speak of (its scale will be 0
// in float16).
inline float finite_or_zero(float x) { return std::fabs(x) <= std::numeric_limits<float>::max() ? x : 0; }
inline Lane finite_or_zero(Lane x) {
  constexpr float kMax = std::numeric_limits<float>::max();
  return ((x <= kMax) & (x >= -kMax)) ? x : same(0.0f);
}

void first_line(Block& b) {
  const Lane guess = same(kLevels) / (b.highest - b.lowest);
  b.scale = 1 / guess;
  b.minus_m = b.guess_base = b.lowest;
  b.guess = finite_or_zero(guess);
  Levels levels;
  levels_of(b, b.guess, b.guess_base, levels);
  b.error = line_error(b, levels, b.scale, b.minus_m);
}

void try_guess(int k, Block& b) {
  // The range is that of the best line so far: its offset may have left the lowest element.
  const Lane guess =
      finite_or_zero(same(-1.0f + 0.1f * static_cast<float>(k) + kLevels) / (b.highest - b.minus_m));
  Levels levels;
  levels_of(b, guess, b.minus_m, levels);
  const LevelSums s = level_sums(b, levels);
  const Lane determinant = b.sum_w * s.nn - s.n * s.n;
  Lane scale = (b.sum_w * s.nx - b.sum_x * s.n) / determinant;
  Lane offset = (s.nn * b.sum_x - s.n * s.nx) / determinant;
  // The format subtracts its minimum, so no positive offset: a line through 0 instead.
  scale = offset > 0.0f ? s.nx / s.nn : scale;
  offset = offset > 0.0f ? same(0.0f) : offset;
  const Lane error = line_error(b, levels, scale, offset);
  const auto better = (determinant > 0.0f) & (error < b.error);
  b.error = better ? error : b.error;
  b.guess = better ? guess : b.guess;
  b.guess_base = better ? b.minus_m : b.guess_base;
  b.scale = better ? scale : b.scale;
  b.minus_m = better ? offset : b.minus_m;
}

// 6-bit integers q_p = round(v_p / step) with the step of the largest; returns the step.
float round_to_6_bits(const Lane& values, uint8_t (&q)[kParts]) {
  float largest = 0;
  for (int p = 0; p < kParts; ++p) largest = values[p] > largest ? values[p] : largest;
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
  const Lane m = -b.minus_m;
  BlockQ4_K block{};
  block.d = float16_scale(round_to_6_bits(b.scale, scales));
  block.dmin = float16_scale(round_to_6_bits(m, minima));
  pack_scales(scales, minima, block.scales);

  const float d = to_float(Float16{block.d});
  const float dmin = to_float(Float16{block.dmin});
  Lane scale;
  Lane minimum;
  for (int p = 0; p < kParts; ++p) {
    scale[p] = d * static_cast<float>(scales[p]);
    minimum[p] = dmin * static_cast<float>(minima[p]);
  }
  for (int i = 0; i < kElements; ++i) {
    // With a stored scale of 0 levels make no difference; the search's stay, as in ggml's files.
    const Lane level =
        nearest_level(scale != 0.0f ? (b.x[i] + minimum) / scale : b.guess * (b.x[i] - b.guess_base));
    for (int p = 0; p < kParts; ++p) {
      block.q[32 * (p / 2) + i] |= static_cast<uint8_t>(static_cast<int>(level[p]) << (p % 2 * 4));
    }
  }
  return block;
}

}  // namespace kilin::quant
