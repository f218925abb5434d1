// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 and AMX (cmake/isa.cmake); runs only where base/cpu.h found both.
#include "kernels/matmul/amx.h"

#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/vec.h"
#include "kernels/matmul/integers.h"
#include "kernels/matmul/layout.h"

namespace kilin::amx {
namespace {

using namespace avx512;  // NOLINT: the SIMD vocabulary, compiled for this file's instruction set

constexpr int64_t kTileBytes = 1024;
// Columns that are widened and multiplied at once: the terms of 2 panels are 16 KB and stay in L1 while the
// tokens pass by.
constexpr int64_t kDepth = 128;
constexpr int64_t kDepthChunks = kDepth / kTileColumns;
constexpr int64_t kPanels = 2;

// bfloat16 terms of 16 rows x 2 columns: x = high + low, both rounded to nearest (ties away from zero)
struct Terms {
  VecUint high, low;
};

KILIN_INLINE VecUint rounded(Vec x) { return (reinterpret_cast<VecUint>(x) + 0x8000u); }

KILIN_INLINE Terms split(Vec first, Vec second) {
  const VecUint a = rounded(first) & 0xffff0000u;
  const VecUint b = rounded(second) & 0xffff0000u;
  const Vec a_rest = first - reinterpret_cast<Vec>(a);
  const Vec b_rest = second - reinterpret_cast<Vec>(b);
  return {a >> 16 | b, rounded(a_rest) >> 16 | (rounded(b_rest) & 0xffff0000u)};
}

KILIN_INLINE void store_terms(const Terms& t, std::byte* high, std::byte* low) {
  std::memcpy(high, &t.high, 64);
  std::memcpy(low, &t.low, 64);
}

// x = n scale + bias for four integers n of each row (a byte of w each): two pairs of terms
KILIN_INLINE void widen_group(VecUint w, Vec scale, Vec bias, std::byte* high, std::byte* low) {
  Vec x[4];
  for (int i = 0; i < 4; ++i) {
    const auto n = reinterpret_cast<VecInt>((w >> (8 * i)) & 255u);
    x[i] = __builtin_convertvector(n, Vec) * scale + bias;
  }
  store_terms(split(x[0], x[1]), high, low);
  store_terms(split(x[2], x[3]), high + 64, low + 64);
}

// Lane i of the result is lane index[i] % 16 of v.
KILIN_INLINE Vec permute(Vec v, VecUint index) {
#if defined(__clang__)
  return reinterpret_cast<Vec>(
      _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(v)));
#else
  return __builtin_shuffle(v, reinterpret_cast<VecInt>(index));
#endif
}

// The same for the four-bit integers at bits `shift` on of each byte: a permutation of 0.0 to 15.0 looks only
// at the lowest four bits of an index, which spares the masks and the conversions.
KILIN_INLINE void widen_nibbles(VecUint w, int shift, Vec scale, Vec bias, std::byte* high, std::byte* low) {
  const Vec values{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec x[4];
  for (int i = 0; i < 4; ++i) x[i] = permute(values, w >> (8 * i + shift)) * scale + bias;
  store_terms(split(x[0], x[1]), high, low);
  store_terms(split(x[2], x[3]), high + 64, low + 64);
}

// The terms of `chunks` x 32 columns from chunk `first` on: high and low tiles [chunk][16 pairs][16 rows][2].
void widen_q8_0(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ8_0);
  for (int64_t b = first; b < first + chunks; ++b, high += kTileBytes, low += kTileBytes) {
    const std::byte* group = panel + b / 2 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + b % 2 * 8 * 64;
    const Vec d = load_f16(group + b % 2 * 32);
    const Vec bias = d * splat(-128.0f);
    for (int u = 0; u < 8; ++u)
      widen_group(load_unit(units + u * 64), d, bias, high + u * 128, low + u * 128);
  }
}

void widen_q4_0(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ4_0);
  for (int64_t b = first; b < first + chunks; ++b, high += kTileBytes, low += kTileBytes) {
    const std::byte* group = panel + b / 2 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + b % 2 * 4 * 64;
    const Vec d = load_f16(group + b % 2 * 32);
    const Vec bias = d * splat(-8.0f);
    for (int u = 0; u < 4; ++u) {
      const VecUint w = load_unit(units + u * 64);
      const int64_t at = u * 128;
      widen_nibbles(w, 0, d, bias, high + at, low + at);
      widen_nibbles(w, 4, d, bias, high + at + 512, low + at + 512);
    }
  }
}

void widen_q4_k(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ4_K);
  for (int64_t part = first; part < first + chunks; ++part, high += kTileBytes, low += kTileBytes) {
    const std::byte* group = panel + part / 8 * kGroup.bytes;
    const std::byte* scales = group + 64 + part % 8 * 32;
    const std::byte* units = group + kGroup.header + part % 8 / 2 * 8 * 64;
    const Vec scale = load_f16(group) * load_u8(scales);
    const Vec least = load_f16(group + 32) * load_u8(scales + 16);
    for (int u = 0; u < 8; ++u) {
      widen_nibbles(load_unit(units + u * 64), static_cast<int>(part % 2 * 4), scale, -least, high + u * 128,
                    low + u * 128);
    }
  }
}

void widen_q6_k(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  constexpr packed::Group kGroup = packed::group(Dtype::kQ6_K);
  for (int64_t part = first; part < first + chunks; ++part, high += kTileBytes, low += kTileBytes) {
    const auto quarter = static_cast<int>(part % 4);
    const std::byte* group = panel + part / 8 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + part % 8 / 4 * 24 * 64;
    const Vec d = load_f16(group);
    for (int u = 0; u < 8; ++u) {
      const VecUint low_bits = load_unit(units + (quarter % 2 * 8 + u) * 64) >> (quarter / 2 * 4);
      const VecUint high_bits = load_unit(units + (16 + u) * 64) >> (2 * quarter);
      const VecUint w = (low_bits & 0x0f0f0f0fu) | ((high_bits & 0x03030303u) << 4);
      const Vec scale = d * load_i8(group + 32 + (part % 8 * 2 + u / 4) * 16);
      widen_group(w, scale, scale * splat(-32.0f), high + u * 128, low + u * 128);
    }
  }
}

void widen_f16(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  for (int64_t u = 0; u < chunks * 16; ++u) {
    const VecUint pair = load_unit(panel + first * kTileBytes + u * 64);
    const VecHalfBits even = __builtin_convertvector(pair, VecHalfBits);
    const VecHalfBits odd = __builtin_convertvector(pair >> 16, VecHalfBits);
    store_terms(split(load_f16(&even), load_f16(&odd)), high + u * 64, low + u * 64);
  }
}

void widen_f32(const std::byte* panel, int64_t first, int64_t chunks, std::byte* high, std::byte* low) {
  for (int64_t u = 0; u < chunks * 16; ++u) {
    const std::byte* unit = panel + first * 2 * kTileBytes + u * 128;
    const auto even = reinterpret_cast<Vec>(load_unit(unit));
    const auto odd = reinterpret_cast<Vec>(load_unit(unit + 64));
    store_terms(split(even, odd), high + u * 64, low + u * 64);
  }
}

void widen(const WeightMatrix& w, const std::byte* panel, int64_t first, int64_t chunks, std::byte* high,
           std::byte* low) {
  switch (w.dtype) {
    case Dtype::kQ8_0:
      return widen_q8_0(panel, first, chunks, high, low);
    case Dtype::kQ4_0:
      return widen_q4_0(panel, first, chunks, high, low);
    case Dtype::kQ4_K:
      return widen_q4_k(panel, first, chunks, high, low);
    case Dtype::kQ6_K:
      return widen_q6_k(panel, first, chunks, high, low);
    case Dtype::kF32:
      return widen_f32(panel, first, chunks, high, low);
    default:
      return widen_f16(panel, first, chunks, high, low);
  }
}

// What multiplies one block of depth: 2 token tiles x 2 panels.
struct Operands {
  const std::byte* a[2];       // high term of the first chunk of each token tile; the low term 1,024 bytes on
  const std::byte* b_high[2];  // of each panel
  const std::byte* b_low[2];   // null for BF16
  int64_t chunks;
};

// Tiles 0 to 3 hold C (token tile i, panel j in 2 i + j), 4 and 5 A, 6 and 7 B. A tile is loaded again only
// after two products with the other one, so that loads run beside products.
template <bool kTwoTerms>
KILIN_INLINE void multiply_block(const Operands& o) {
  for (int64_t k = 0; k < o.chunks; ++k) {
    const std::byte* a0 = o.a[0] + k * 2 * kTileBytes;
    const std::byte* a1 = o.a[1] + k * 2 * kTileBytes;
    const int64_t b = k * kTileBytes;
    _tile_loadd(6, o.b_high[0] + b, 64);
    _tile_loadd(4, a0 + kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, o.b_high[1] + b, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1, 64);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwoTerms) {
      _tile_loadd(6, o.b_low[0] + b, 64);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(7, o.b_low[1] + b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums of 32 tokens x 2 panels: C tiles 0 to 3, 1 KB each. They stay in a buffer of their own over the blocks
// of depth: rows of y are a power of two apart, and 16 of them would fight for the same lines of the cache.
constexpr int64_t kSumBytes = 4 * kTileBytes;

template <bool kTwoTerms>
void multiply(const Operands& o, std::byte* sums, bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileBytes, 64);
    _tile_loadd(2, sums + 2 * kTileBytes, 64);
    _tile_loadd(3, sums + 3 * kTileBytes, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  multiply_block<kTwoTerms>(o);
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileBytes, 64);
  _tile_stored(2, sums + 2 * kTileBytes, 64);
  _tile_stored(3, sums + 3 * kTileBytes, 64);
}

// y of at most 32 tokens and 32 rows. kStream: y is aligned to lines and written past the caches.
template <bool kStream>
KILIN_INLINE void write_rows(const std::byte* sums, int64_t tokens, int64_t rows, float* y,
                             int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t panel = 0; panel * 16 < rows; ++panel) {
      const std::byte* from = sums + (t / 16 * 2 + panel) * kTileBytes + t % 16 * 64;
      float* to = y + t * y_stride + panel * 16;
      Vec sum;
      std::memcpy(&sum, from, sizeof sum);
      if (rows - panel * 16 < 16) {
        store_part(to, sum, static_cast<int>(rows - panel * 16));
      } else if constexpr (kStream) {
        _mm512_stream_ps(to, reinterpret_cast<__m512>(sum));
      } else {
        store(to, sum);
      }
    }
  }
}

void write_sums(const std::byte* sums, int64_t tokens, int64_t rows, bool stream, float* y,
                int64_t y_stride) {
  if (stream) {
    write_rows<true>(sums, tokens, rows, y, y_stride);
  } else {
    write_rows<false>(sums, tokens, rows, y, y_stride);
  }
}

constexpr int64_t kWideBytes = kPanels * 2 * kDepthChunks * kTileBytes;
constexpr int64_t kSumsBytes = kMostBlockTokens / 32 * kSumBytes;

// Operands of B for one block of depth: the weights themselves, or their terms in `wide`.
Operands weights_block(const WeightMatrix& w, const std::byte* panel, int64_t second, int64_t chunk,
                       int64_t chunks, std::byte* wide) {
  Operands o;
  o.chunks = chunks;
  for (int j = 0; j < 2; ++j) {
    const std::byte* source = panel + j * second;
    if (w.dtype == Dtype::kBF16) {
      o.b_high[j] = source + chunk * kTileBytes;
      o.b_low[j] = nullptr;
      continue;
    }
    std::byte* high = wide + (second != 0 ? j : 0) * 2 * kDepthChunks * kTileBytes;
    std::byte* low = high + kDepthChunks * kTileBytes;
    if (j == 0 || second != 0) widen(w, source, chunk, chunks, high, low);
    o.b_high[j] = high;
    o.b_low[j] = low;
  }
  return o;
}

KILIN_INLINE void store_unit(std::byte* to, const VecHalfBits* unit, bool stream) {
  __m512i v;
  std::memcpy(&v, unit, 64);
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
  } else {
    _mm512_storeu_si512(to, v);
  }
}

// The terms of 32 columns of one token: a row of the high tile, and one of the low tile behind it.
KILIN_INLINE void split_row(Vec first, Vec second, bool stream, std::byte* to) {
  const VecUint a = rounded(first) & 0xffff0000u;
  const VecUint b = rounded(second) & 0xffff0000u;
  const VecUint a_rest = rounded(first - reinterpret_cast<Vec>(a));
  const VecUint b_rest = rounded(second - reinterpret_cast<Vec>(b));
  const VecHalfBits parts[4] = {
      __builtin_convertvector(a >> 16, VecHalfBits), __builtin_convertvector(b >> 16, VecHalfBits),
      __builtin_convertvector(a_rest >> 16, VecHalfBits), __builtin_convertvector(b_rest >> 16, VecHalfBits)};
  store_unit(to, &parts[0], stream);
  store_unit(to + kTileBytes, &parts[2], stream);
}

// Asks the second-level cache for the weights of the next block of depth, a few lines beside the products of
// every 32 tokens: they come from memory, and widening would wait for each of its streams anew.
class Ahead {
 public:
  // The block from chunk `chunk` on; past the end of a panel the first block of the next pair, if there is
  // one.
  Ahead(const std::byte* panel, int64_t second, int64_t panel_bytes, int64_t chunk, int64_t depth,
        int64_t chunks, bool more) {
    const int64_t size = (panel_bytes * depth + chunks - 1) / chunks;
    if (chunk < chunks) {
      from_[0] = panel + panel_bytes * chunk / chunks;
      from_[1] = from_[0] + second;
    } else {
      from_[0] = panel + kPanels * panel_bytes;
      from_[1] = from_[0] + panel_bytes;
    }
    left_ = chunk < chunks || more ? size : 0;
  }
  void step() {
    for (int i = 0; i < 8 && left_ > 0; ++i, left_ -= 64) {
      __builtin_prefetch(from_[0], 0, 2);
      __builtin_prefetch(from_[1], 0, 2);
      from_[0] += 64;
      from_[1] += 64;
    }
  }

 private:
  const std::byte* from_[2];
  int64_t left_;
};

}  // namespace

int64_t split_bytes(int64_t tokens, int64_t cols) {
  return packed::round_up(tokens, kTileTokens) * packed::columns(cols) * 4;
}

void split_activations(const float* x, int64_t x_stride, const int32_t* x_rows, int64_t tokens, int64_t cols,
                       int64_t tile, bool stream, std::byte* split_to) {
  const int64_t chunks = packed::columns(cols) / kTileColumns;
  std::byte* const to = split_to + tile * chunks * 2 * kTileBytes;
  // A token at a time: its row is one stream.
  for (int64_t i = 0; i < kTileTokens; ++i) {
    const int64_t t = tile * kTileTokens + i;
    const float* row = t < tokens ? x + (x_rows != nullptr ? x_rows[t] : t) * x_stride : nullptr;
    for (int64_t k = 0; k < chunks; ++k) {
      const int64_t left = row != nullptr ? cols - k * kTileColumns : 0;
      Vec first = zero(), second = zero();
      if (left >= 32) {
        first = load(row + k * kTileColumns);
        second = load(row + k * kTileColumns + 16);
      } else if (left > 0) {
        first = load_part(row + k * kTileColumns, static_cast<int>(left < 16 ? left : 16));
        if (left > 16) second = load_part(row + k * kTileColumns + 16, static_cast<int>(left - 16));
      }
      split_row(first, second, stream, to + k * 2 * kTileBytes + i * 64);
    }
  }
  if (stream) _mm_sfence();
}

void matmul_tiles(const MatmulJob& job, PanelRange panels, int64_t first, int64_t last, bool stream,
                  const std::byte* split_from, std::byte* scratch) {
  alignas(64) const TileConfig config;
  _tile_loadconfig(&config);
  const WeightMatrix& w = job.w;
  const int64_t chunks = packed::columns(w.cols) / kTileColumns;
  const int64_t panel_bytes = packed::panel_bytes(w.dtype, w.cols);
  std::byte* const sums = scratch + kWideBytes;
  stream = stream && reinterpret_cast<uintptr_t>(job.y) % 64 == 0 && job.y_stride % 16 == 0;
  for (int64_t i = panels.begin; i < panels.end; i += kPanels) {
    const std::byte* panel = static_cast<const std::byte*>(w.data) + i * panel_bytes;
    const int64_t second =
        i + 1 < panels.end ? panel_bytes : 0;  // a lone panel is multiplied twice, stored once
    const int64_t left = w.rows - i * packed::kRows;
    const int64_t rows = left < (second == 0 ? 16 : 32) ? left : (second == 0 ? 16 : 32);
    const auto write = [&](int64_t t) {
      write_sums(sums + (t - first) / 32 * kSumBytes, last - t < 32 ? last - t : 32, rows, stream,
                 job.y + t * job.y_stride + i * packed::kRows, job.y_stride);
    };
    for (int64_t k = 0; k < chunks; k += kDepthChunks) {
      const int64_t depth = chunks - k < kDepthChunks ? chunks - k : kDepthChunks;
      const bool finished = k + depth == chunks;
      Operands o = weights_block(w, panel, second, k, depth, scratch);
      Ahead ahead(panel, second, panel_bytes, k + depth, depth, chunks, i + kPanels < panels.end);
      for (int64_t t = first; t < last; t += 2 * kTileTokens) {
        ahead.step();
        o.a[0] = split_from + (t / kTileTokens * chunks + k) * 2 * kTileBytes;
        o.a[1] = t + kTileTokens < last ? o.a[0] + chunks * 2 * kTileBytes : o.a[0];
        std::byte* to = sums + (t - first) / 32 * kSumBytes;
        if (w.dtype == Dtype::kBF16) {
          multiply<false>(o, to, k > 0);
        } else {
          multiply<true>(o, to, k > 0);
        }
        // y of the tokens before: beside the products of these, and not right behind its own tile stores
        if (finished && t > first) write(t - 32);
      }
      if (finished) write((last - 1 - first) / 32 * 32 + first);
    }
  }
  _tile_release();
  if (stream) _mm_sfence();  // before another thread is told that y is there
}

int64_t scratch_bytes() { return kWideBytes + kSumsBytes; }

}  // namespace kilin::amx
