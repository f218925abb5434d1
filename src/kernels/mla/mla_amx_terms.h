// SPDX-License-Identifier: Apache-2.0
// Floats as two bfloat16 terms, in the shapes that AMX's tiles want (include only from mla_amx.cc).
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels/mla/mla_simd.h"

namespace kilin::amx {
namespace {

using namespace avx512;  // NOLINT: the SIMD vocabulary, compiled for the including file's instruction set

constexpr int64_t kTile = 256;  // floats (1 KB) of a tile
constexpr int64_t kKeyTiles = kMlaKeyBlock / 16;
constexpr int64_t kKeyGroups = kMlaKeyBlock / 32;
static_assert(kMlaKeyBlock == 64);

// A block of keys in the cache, and the one after it, whose lines are asked for meanwhile: those of even keys
// with the scores, those of odd keys with the contexts.
struct Keys {
  const char* cache;
  const char* next;  // nullptr: none
  int64_t row_bytes;
  int64_t count;
};

// Pairs (first, second) of bfloat16 in 32-bit lanes, as an A row or a row of B wants them: x = high + low.
struct Terms {
  VecUint high, low;
};
KILIN_INLINE VecUint bits(Vec x) { return reinterpret_cast<VecUint>(x); }
KILIN_INLINE VecUint pack(VecUint first, VecUint second) {
  constexpr int kAOrBAndC = 0xf8;
  return reinterpret_cast<VecUint>(_mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(first >> 16),
                                                             reinterpret_cast<__m512i>(second),
                                                             _mm512_set1_epi32(-65536), kAOrBAndC));
}

// Exact for numbers of 11 bits, as float16 has: 8 in the high term, the rest in the low one.
KILIN_INLINE Terms split_half(Vec first, Vec second) {
  const Vec a = reinterpret_cast<Vec>(bits(first) & 0xffff0000u);
  const Vec b = reinterpret_cast<Vec>(bits(second) & 0xffff0000u);
  return {pack(bits(first), bits(second)), pack(bits(first - a), bits(second - b))};
}
// Rounded to nearest, ties away from zero.
KILIN_INLINE Terms split(Vec first, Vec second) {
  const VecUint a = bits(first) + 0x8000u;
  const VecUint b = bits(second) + 0x8000u;
  const Vec a_rest = first - reinterpret_cast<Vec>(a & 0xffff0000u);
  const Vec b_rest = second - reinterpret_cast<Vec>(b & 0xffff0000u);
  return {pack(a, b), pack(bits(a_rest) + 0x8000u, bits(b_rest) + 0x8000u)};
}
KILIN_INLINE void put(float* to, VecUint v) { std::memcpy(to, &v, sizeof v); }

KILIN_INLINE void put_terms(const Terms& t, float* high) {
  put(high, t.high);
  put(high + kTile, t.low);
}

// Chunk c of keys [begin, begin + 16 tiles) as rows, [tile][high, low]; keys that are not there are zero.
inline void split_rows(const Keys& keys, int64_t begin, int64_t tiles, int64_t c, bool all_lines,
                       float* stage) {
  const char* from = keys.cache + begin * keys.row_bytes + 64 * c;
  if (keys.count < kMlaKeyBlock) {
    for (int64_t i = 0; i < 16 * tiles; ++i) {
      Terms terms{};
      if (begin + i < keys.count) {
        const char* row = from + i * keys.row_bytes;
        terms = split_half(load_f16(row), load_f16(row + 32));
      }
      put_terms(terms, stage + i / 16 * 2 * kTile + i % 16 * 16);
    }
    return;
  }
  const int64_t step = keys.row_bytes;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float* to = stage + tile * 2 * kTile;
    const char* row = from + tile * 16 * step;
    const char* line = keys.next == nullptr ? row : keys.next + (row - keys.cache);
    for (int64_t i = 0; i < 16; i += 2) {
      put_terms(split_half(load_f16(row), load_f16(row + 32)), to);
      put_terms(split_half(load_f16(row + step), load_f16(row + step + 32)), to + 16);
      __builtin_prefetch(line, 0, 2);
      if (all_lines) __builtin_prefetch(line + step, 0, 2);
      row += 2 * step;
      line += 2 * step;
      to += 32;
    }
  }
}

// Latents [n, n + 64) as pairs of keys (i, 16 + i) of each group of 32, [group][4][high, low].
inline void split_pairs(const Keys& keys, int64_t n, float* stage) {
  const int64_t step = keys.row_bytes;
  const char* from = keys.cache + 2 * n;
  if (keys.count < kMlaKeyBlock) {
    for (int64_t k = 0; k < kMlaKeyBlock; k += k % 32 == 15 ? 17 : 1) {
      for (int64_t v = 0; v < 4; ++v) {
        const Vec a = k < keys.count ? load_f16(from + k * step + 32 * v) : zero();
        const Vec b = k + 16 < keys.count ? load_f16(from + (k + 16) * step + 32 * v) : zero();
        put_terms(split_half(a, b), stage + (k / 32 * 8 + v * 2) * kTile + k % 16 * 16);
      }
    }
    return;
  }
  for (int64_t g = 0; g < kKeyGroups; ++g) {
    const char* first = from + 32 * g * step;
    const char* line = keys.next == nullptr ? first : keys.next + (first - keys.cache);
    float* to = stage + g * 8 * kTile;
    for (int64_t i = 0; i < 16; ++i) {
      const char* second = first + 16 * step;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        put_terms(split_half(load_f16(first + 32 * v), load_f16(second + 32 * v)), to + v * 2 * kTile);
      }
      if (i % 2 == 1) {
        __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(line + 64, 0, 2);
        __builtin_prefetch(line + 16 * step, 0, 2);
        __builtin_prefetch(line + 16 * step + 64, 0, 2);
      }
      first += step;
      line += step;
      to += 16;
    }
  }
}

}  // namespace
}  // namespace kilin::amx
