// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 (cmake/isa.cmake); runs only where base/cpu.h found VNNI.
#include "kernels/matmul/vnni.h"

#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/vec.h"
#include "kernels/matmul/integers.h"
#include "kernels/matmul/layout.h"
#include "kernels/matmul/matmul_simd.h"

namespace kilin::vnni {
namespace {

using namespace avx512;  // NOLINT: the SIMD vocabulary, compiled for this file's instruction set

constexpr int64_t kPanels = 2;
constexpr int64_t kDepthBlocks = 16;  // blocks of 32 columns that are unpacked at once

// Two panels, kDepthBlocks blocks of 32 columns: w = scale (unit - offset) - least.
struct Wide {
  uint8_t unit[kDepthBlocks][8][kPanels][64];
  float scale[kDepthBlocks][2][kPanels][16];  // of 16 columns (Q6_K); the others use the first
  float least[kDepthBlocks][kPanels][16];     // Q4_K
};

KILIN_INLINE void store_unit(uint8_t* p, VecUint v) { std::memcpy(p, &v, 64); }

// Types unpack block b of a panel to part j of w.wide[i].
struct Q8_0 {
  static constexpr int kOffset = 128, kSides = 1;
  static constexpr bool kMins = false;
  static void unpack(const std::byte* panel, int64_t b, int64_t i, int64_t j, Wide& w) {
    constexpr packed::Group kGroup = packed::group(Dtype::kQ8_0);
    const std::byte* group = panel + b / 2 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + b % 2 * 8 * 64;
    store(w.scale[i][0][j], load_f16(group + b % 2 * 32));
    for (int u = 0; u < 8; ++u) store_unit(w.unit[i][u][j], load_unit(units + u * 64));
  }
};
struct Q4_0 {
  static constexpr int kOffset = 8, kSides = 1;
  static constexpr bool kMins = false;
  static void unpack(const std::byte* panel, int64_t b, int64_t i, int64_t j, Wide& w) {
    constexpr packed::Group kGroup = packed::group(Dtype::kQ4_0);
    const std::byte* group = panel + b / 2 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + b % 2 * 4 * 64;
    store(w.scale[i][0][j], load_f16(group + b % 2 * 32));
    for (int u = 0; u < 4; ++u) {
      const VecUint both = load_unit(units + u * 64);
      store_unit(w.unit[i][u][j], both & 0x0f0f0f0fu);
      store_unit(w.unit[i][u + 4][j], (both >> 4) & 0x0f0f0f0fu);
    }
  }
};
struct Q4_K {
  static constexpr int kOffset = 0, kSides = 1;
  static constexpr bool kMins = true;
  static void unpack(const std::byte* panel, int64_t b, int64_t i, int64_t j, Wide& w) {
    constexpr packed::Group kGroup = packed::group(Dtype::kQ4_K);
    const std::byte* group = panel + b / 8 * kGroup.bytes;
    const std::byte* scales = group + 64 + b % 8 * 32;
    const std::byte* units = group + kGroup.header + b % 8 / 2 * 8 * 64;
    store(w.scale[i][0][j], load_f16(group) * load_u8(scales));
    store(w.least[i][j], load_f16(group + 32) * load_u8(scales + 16));
    for (int u = 0; u < 8; ++u) {
      store_unit(w.unit[i][u][j], (load_unit(units + u * 64) >> (b % 2 * 4)) & 0x0f0f0f0fu);
    }
  }
};
struct Q6_K {
  static constexpr int kOffset = 32, kSides = 2;
  static constexpr bool kMins = false;
  static void unpack(const std::byte* panel, int64_t b, int64_t i, int64_t j, Wide& w) {
    constexpr packed::Group kGroup = packed::group(Dtype::kQ6_K);
    const auto quarter = static_cast<int>(b % 4);
    const std::byte* group = panel + b / 8 * kGroup.bytes;
    const std::byte* units = group + kGroup.header + b % 8 / 4 * 24 * 64;
    for (int side = 0; side < 2; ++side) {
      store(w.scale[i][side][j], load_f16(group) * load_i8(group + 32 + (b % 8 * 2 + side) * 16));
    }
    for (int u = 0; u < 8; ++u) {
      const VecUint low = load_unit(units + (quarter % 2 * 8 + u) * 64) >> (quarter / 2 * 4);
      const VecUint high = load_unit(units + (16 + u) * 64) >> (2 * quarter);
      store_unit(w.unit[i][u][j], (low & 0x0f0f0f0fu) | ((high & 0x03030303u) << 4));
    }
  }
};

// Tokens of a register tile. Larger tiles (up to 6 with two bytes, 12 with one) were 10 to 30 % slower on a
// Zen 4, although they load less: docs/notes/20261125-cpu-vs-llama-cpp.md.
template <class Block>
constexpr int kTileTokens = 4;
template <>
constexpr int kTileTokens<ActivationBlock> = 3;

// sums[t][j] += the products of block i of the weights with block i of x[t]
template <class Type, int M, class Block>
KILIN_INLINE void multiply_block(const Wide& w, int64_t i, const Block* const (&x)[M],
                                 Vec (&sums)[M][kPanels]) {
  constexpr bool kTwoBytes = sizeof(Block::bytes) == 64;
  constexpr int kUnits = 8 / Type::kSides;
#pragma GCC unroll 2
  for (int side = 0; side < Type::kSides; ++side) {
    __m512i low[M][kPanels], high[M][kPanels];
#pragma GCC unroll 4
    for (int t = 0; t < M; ++t) {
      const Block& a = x[t][i];
      const int sum = Type::kSides == 1 ? a.sums[0] + a.sums[1] : a.sums[side];
      low[t][0] = low[t][1] = _mm512_set1_epi32(-Type::kOffset * sum);
      high[t][0] = high[t][1] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int u = side * kUnits; u < (side + 1) * kUnits; ++u) {
      const __m512i w0 = _mm512_load_si512(w.unit[i][u][0]);
      const __m512i w1 = _mm512_load_si512(w.unit[i][u][1]);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const int8_t* bytes = x[t][i].bytes + 4 * u;
        const __m512i v_low = _mm512_set1_epi32(load_i32(bytes));
        low[t][0] = _mm512_dpbusd_epi32(low[t][0], w0, v_low);
        low[t][1] = _mm512_dpbusd_epi32(low[t][1], w1, v_low);
        if constexpr (kTwoBytes) {
          const __m512i v_high = _mm512_set1_epi32(load_i32(bytes + 32));
          high[t][0] = _mm512_dpbusd_epi32(high[t][0], w0, v_high);
          high[t][1] = _mm512_dpbusd_epi32(high[t][1], w1, v_high);
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kPanels; ++j) {
      const Vec scale = load(w.scale[i][side][j]);
#pragma GCC unroll 4
      for (int t = 0; t < M; ++t) {
        const Block& a = x[t][i];
        auto sum = reinterpret_cast<VecInt>(low[t][j]);
        if constexpr (kTwoBytes) sum += reinterpret_cast<VecInt>(high[t][j]) << 8;
        sums[t][j] += __builtin_convertvector(sum, Vec) * (scale * splat(a.scale));
        // once, not with either side
        if constexpr (Type::kMins) sums[t][j] -= load(w.least[i][j]) * splat(a.total);
      }
    }
  }
}

// Where the activations of tokens lie: all columns of a token after one another, from block `first` on.
template <class Block>
struct Tokens {
  const Block* x;
  const int32_t* rows;  // of x, or null: token t has row t
  int64_t blocks, first;
  const Block* at(int64_t t) const { return x + (rows != nullptr ? rows[t] : t) * blocks + first; }
};

template <class Type, int M, class Block>
KILIN_INLINE void multiply_tokens(const Wide& w, int64_t depth, const Tokens<Block>& tokens, int64_t t,
                                  int64_t count, float (*sums)[kPanels][16]) {
  if constexpr (M > 1) {
    if (count < M) return multiply_tokens<Type, M - 1>(w, depth, tokens, t, count, sums);
  }
  const Block* x[M];
  for (int i = 0; i < M; ++i) x[i] = tokens.at(t + i);
  Vec own[M][kPanels];  // in registers: a store of 64 bytes takes two cycles on a Zen 4
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < kPanels; ++j) own[i][j] = load(sums[i][j]);
  }
  for (int64_t i = 0; i < depth; ++i) multiply_block<Type, M>(w, i, x, own);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < kPanels; ++j) store(sums[i][j], own[i][j]);
  }
}

struct Scratch {
  Wide wide;
  float sums[kMostBlockTokens][kPanels][16];
};

template <class Type, class Block>
void multiply_panels(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const Block* x,
                     Scratch& s) {
  constexpr int kTile = kTileTokens<Block>;
  const WeightMatrix& w = job.w;
  const int64_t blocks = w.cols / 32;
  const int64_t panel_bytes = packed::panel_bytes(w.dtype, w.cols);
  const auto* base = static_cast<const std::byte*>(w.data);
  for (int64_t p = panels.begin; p < panels.end; p += kPanels) {
    const int64_t second = p + 1 < panels.end ? 1 : 0;  // a lone panel is multiplied twice, stored once
    const int64_t left = w.rows - p * packed::kRows;
    const int64_t rows = left < (1 + second) * 16 ? left : (1 + second) * 16;
    std::memset(s.sums, 0, static_cast<size_t>(tokens.end - tokens.begin) * sizeof s.sums[0]);
    for (int64_t k = 0; k < blocks; k += kDepthBlocks) {
      const int64_t depth = blocks - k < kDepthBlocks ? blocks - k : kDepthBlocks;
      for (int64_t j = 0; j < kPanels; ++j) {
        const std::byte* panel = base + (p + j * second) * panel_bytes;
        for (int64_t i = 0; i < depth; ++i) Type::unpack(panel, k + i, i, j, s.wide);
      }
      int64_t tiles = (tokens.end - tokens.begin + kTile - 1) / kTile;  // of equal height
      for (int64_t t = tokens.begin; t < tokens.end; --tiles) {
        const int64_t height = (tokens.end - t + tiles - 1) / tiles;
        multiply_tokens<Type, kTile>(s.wide, depth, Tokens<Block>{x, job.x_rows, blocks, k}, t, height,
                                     s.sums + (t - tokens.begin));
        t += height;
      }
    }
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
      write_row(s.sums[t - tokens.begin], rows, stream, job.y + t * job.y_stride + p * packed::kRows);
  }
}

template <class Block>
void multiply(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const Block* x,
              std::byte* scratch) {
  auto& s = *reinterpret_cast<Scratch*>(scratch);
  stream = stream && reinterpret_cast<uintptr_t>(job.y) % 64 == 0 && job.y_stride % 16 == 0;
  switch (job.w.dtype) {
    case Dtype::kQ8_0:
      multiply_panels<Q8_0>(job, panels, tokens, stream, x, s);
      break;
    case Dtype::kQ4_0:
      multiply_panels<Q4_0>(job, panels, tokens, stream, x, s);
      break;
    case Dtype::kQ4_K:
      multiply_panels<Q4_K>(job, panels, tokens, stream, x, s);
      break;
    default:
      multiply_panels<Q6_K>(job, panels, tokens, stream, x, s);
      break;
  }
  if (stream) _mm_sfence();  // before another thread is told that y is there
}

}  // namespace

void quantize_bytes(const float* x, int64_t cols, ByteBlock* blocks) {
  for (int64_t b = 0; b < cols / 32; ++b, x += 32) {
    ByteBlock& block = blocks[b];
    const Vec first = load(x), second = load(x + 16);
    const float largest = reduce_max(max(max(first, -first), max(second, -second)));
    if (any_spoilt(first, second)) {
      block = {};
      block.scale = block.total = __builtin_nanf("");
      continue;
    }
    block.scale = largest / 127.0f;
    const Vec factor = splat(block.scale > 0x1p-125f ? 1.0f / block.scale : 0.0f);
    const __m256i v = bytes_of(rounded(first * factor), rounded(second * factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.bytes), v);
    sums_of_halves(_mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), v), block.sums);
    block.total = block.scale * static_cast<float>(block.sums[0] + block.sums[1]);
  }
}

void matmul_bytes(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream,
                  const ActivationBlock* x, std::byte* scratch) {
  multiply(job, panels, tokens, stream, x, scratch);
}
void matmul_bytes(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const ByteBlock* x,
                  std::byte* scratch) {
  multiply(job, panels, tokens, stream, x, scratch);
}

int64_t scratch_bytes() { return sizeof(Scratch); }

}  // namespace kilin::vnni
