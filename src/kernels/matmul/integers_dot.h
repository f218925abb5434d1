// SPDX-License-Identifier: Apache-2.0
// Products with quantised weights for few tokens: integer dot products per block of 32, scaled and summed in
// float32, each weight read once. Lane r of every vector belongs to row r of a panel, so nothing is summed
// across lanes; activations are broadcast (include only from files that are compiled for an instruction set).
#pragma once
#include "kernels/matmul/integers.h"
#include "kernels/matmul/layout.h"

namespace kilin::KILIN_ISA {
namespace {

// Lanes of a panel's 16 rows, as vectors.
using Rows = Vec[kParts];

// kCount tokens that pass over a panel together. kPrefetch: whether the loop asks for weights ahead.
template <int M, class BlockType, bool kAsk>
struct Tokens {
  static constexpr int kCount = M;
  static constexpr bool kPrefetch = kAsk;
  using Block = BlockType;
  using Dot = BlockDot<Block>;
  const Block* x[M];  // of each token, block 0
};

// Asks for the weights 4 KB on into the second-level cache (the first level has too few outstanding misses to
// cover the latency of memory), and for those 1 KB on into the first: docs/notes/20261124-cpu-matmul.md has
// what was tried. Only where the processor does not see such streams itself (prefetches_streams()).
template <class Tokens>
KILIN_INLINE void prefetch_ahead(const uint8_t* p) {
  if constexpr (Tokens::kPrefetch) {
    __builtin_prefetch(p + 4096, 0, 2);
    __builtin_prefetch(p + 1024, 0, 3);
  }
}

template <class Tokens>
KILIN_INLINE void start(typename Tokens::Dot (&dots)[Tokens::kCount][kParts], const Tokens& tokens, int64_t b,
                        int offset) {
  for (int t = 0; t < Tokens::kCount; ++t) {
    const auto& x = tokens.x[t][b];
    for (int p = 0; p < kParts; ++p) dot_start(dots[t][p], -offset * (x.sums[0] + x.sums[1]));
  }
}

// sum[t] += d scale_t (sum over block b of 32 of w v), for Q8_0 and Q4_0
template <class Tokens>
KILIN_INLINE void add_scaled(const typename Tokens::Dot (&dots)[Tokens::kCount][kParts],
                             const uint8_t* scales, const Tokens& tokens, int64_t b,
                             Rows (&sum)[Tokens::kCount]) {
  for (int p = 0; p < kParts; ++p) {
    const Vec d = load_f16(scales + 2 * p * kLanes);
    for (int t = 0; t < Tokens::kCount; ++t)
      sum[t][p] += dot_end(dots[t][p]) * (d * splat(tokens.x[t][b].scale));
  }
}

// Types add to sum[t] the products of one group of columns, whose first block of activations is b.

// A group of two blocks of 32 columns with a scale each; the last one may have one block only. Type says how
// many units a block has and adds the products of one.
template <class Type>
struct TwoBlocks {
  template <class Tokens>
  KILIN_INLINE void add_block(const uint8_t* scales, const uint8_t* units, int64_t b, const Tokens& tokens,
                              Rows (&sum)[Tokens::kCount]) {
    typename Tokens::Dot dots[Tokens::kCount][kParts];
    start(dots, tokens, b, Type::kOffset);
#pragma GCC unroll 8
    for (int u = 0; u < Type::kUnits; ++u) {
      prefetch_ahead<Tokens>(units + u * packed::kUnitBytes);
      for (int p = 0; p < kParts; ++p) {
        const VecUint w = load_unit(units + u * packed::kUnitBytes + 4 * p * kLanes);
        for (int t = 0; t < Tokens::kCount; ++t) Type::add_unit(dots[t][p], w, tokens.x[t][b], u);
      }
    }
    add_scaled(dots, scales, tokens, b, sum);
  }
  template <class Tokens>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t blocks, const Tokens& tokens,
                        Rows (&sum)[Tokens::kCount]) {
    const uint8_t* units = group + 64;
    prefetch_ahead<Tokens>(group);
    add_block(group, units, b, tokens, sum);
    if (b + 1 < blocks) add_block(group + 32, units + Type::kUnits * packed::kUnitBytes, b + 1, tokens, sum);
  }
};

struct Q8_0 : TwoBlocks<Q8_0> {
  static constexpr Dtype kDtype = Dtype::kQ8_0;
  static constexpr int kUnits = 8, kOffset = 128;
  template <class Dot, class Block>
  KILIN_INLINE void add_unit(Dot& dot, VecUint w, const Block& x, int u) {
    dot_add(dot, w, x, u);
  }
};

struct Q4_0 : TwoBlocks<Q4_0> {
  static constexpr Dtype kDtype = Dtype::kQ4_0;
  static constexpr int kUnits = 4, kOffset = 8;
  template <class Dot, class Block>
  KILIN_INLINE void add_unit(Dot& dot, VecUint w, const Block& x, int u) {
    dot_add(dot, w & 0x0f0f0f0fu, x, u);
    dot_add(dot, (w >> 4) & 0x0f0f0f0fu, x, u + 4);
  }
};

struct Q4_K {
  static constexpr Dtype kDtype = Dtype::kQ4_K;
  // 64 columns: two parts of the group, which begin with block b of the activations
  template <class Tokens>
  KILIN_INLINE void add_parts(const uint8_t* group, const uint8_t* parts, const uint8_t* units, int64_t b,
                              const Tokens& tokens, Rows (&sum)[Tokens::kCount]) {
    typename Tokens::Dot dots[2][Tokens::kCount][kParts];
    for (auto& half : dots) {
      for (int t = 0; t < Tokens::kCount; ++t) {
        for (int p = 0; p < kParts; ++p) dot_start(half[t][p], 0);
      }
    }
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      prefetch_ahead<Tokens>(units + u * packed::kUnitBytes);
      for (int p = 0; p < kParts; ++p) {
        const VecUint w = load_unit(units + u * packed::kUnitBytes + 4 * p * kLanes);
        const VecUint low = w & 0x0f0f0f0fu;
        const VecUint high = (w >> 4) & 0x0f0f0f0fu;
        for (int t = 0; t < Tokens::kCount; ++t) {
          dot_add(dots[0][t][p], low, tokens.x[t][b], u);
          dot_add(dots[1][t][p], high, tokens.x[t][b + 1], u);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* part = parts + half * 32;
      for (int p = 0; p < kParts; ++p) {
        const Vec scale = load_f16(group + 2 * p * kLanes) * load_u8(part + p * kLanes);
        const Vec least = load_f16(group + 32 + 2 * p * kLanes) * load_u8(part + 16 + p * kLanes);
        for (int t = 0; t < Tokens::kCount; ++t) {
          const auto& x = tokens.x[t][b + half];
          sum[t][p] += dot_end(dots[half][t][p]) * (scale * splat(x.scale));
          sum[t][p] -= least * splat(x.total);
        }
      }
    }
  }
  template <class Tokens>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t, const Tokens& tokens,
                        Rows (&sum)[Tokens::kCount]) {
    for (int i = 0; i < 5; ++i) prefetch_ahead<Tokens>(group + i * 64);
    for (int i = 0; i < 4; ++i) {
      add_parts(group, group + 64 + i * 64, group + 320 + i * 8 * packed::kUnitBytes, b + 2 * i, tokens, sum);
    }
  }
};

struct Q6_K {
  static constexpr Dtype kDtype = Dtype::kQ6_K;
  // 16 columns of each quarter of half a group: units 4 side to 4 side + 3
  template <class Tokens>
  KILIN_INLINE void add_side(const uint8_t* group, const uint8_t* units, int half, int side, int64_t b,
                             const Tokens& tokens, Rows (&sum)[Tokens::kCount]) {
    for (int p = 0; p < kParts; ++p) {
      typename Tokens::Dot dots[4][Tokens::kCount];
      for (int quarter = 0; quarter < 4; ++quarter) {
        for (int t = 0; t < Tokens::kCount; ++t)
          dot_start(dots[quarter][t], -32 * tokens.x[t][b + quarter].sums[side]);
      }
      for (int i = 0; i < 4; ++i) {
        const int u = 4 * side + i;
        const uint8_t* lane = units + 4 * p * kLanes;
        const VecUint even = load_unit(lane + u * packed::kUnitBytes);
        const VecUint odd = load_unit(lane + (u + 8) * packed::kUnitBytes);
        const VecUint high = load_unit(lane + (u + 16) * packed::kUnitBytes);
        const VecUint w[4] = {(even & 0x0f0f0f0fu) | ((high & 0x03030303u) << 4),
                              (odd & 0x0f0f0f0fu) | ((high & 0x0c0c0c0cu) << 2),
                              ((even >> 4) & 0x0f0f0f0fu) | (high & 0x30303030u),
                              ((odd >> 4) & 0x0f0f0f0fu) | ((high & 0xc0c0c0c0u) >> 2)};
        for (int quarter = 0; quarter < 4; ++quarter) {
          for (int t = 0; t < Tokens::kCount; ++t)
            dot_add(dots[quarter][t], w[quarter], tokens.x[t][b + quarter], u);
        }
      }
      const Vec d = load_f16(group + 2 * p * kLanes);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const Vec scale = d * load_i8(group + 32 + (half * 8 + quarter * 2 + side) * 16 + p * kLanes);
        for (int t = 0; t < Tokens::kCount; ++t) {
          sum[t][p] += dot_end(dots[quarter][t]) * (scale * splat(tokens.x[t][b + quarter].scale));
        }
      }
    }
  }
  template <class Tokens>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t, const Tokens& tokens,
                        Rows (&sum)[Tokens::kCount]) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* units = group + 320 + half * 24 * packed::kUnitBytes;
      for (int i = 0; i < 24; ++i) prefetch_ahead<Tokens>(units + i * packed::kUnitBytes);
      for (int side = 0; side < 2; ++side) add_side(group, units, half, side, b + 4 * half, tokens, sum);
    }
  }
};

KILIN_INLINE void store_rows(const Rows& sum, int rows, float* y) {
  for (int p = 0; p < kParts; ++p) {
    const int n = rows - p * kLanes;
    if (n >= kLanes) {
      store(y + p * kLanes, sum[p]);
    } else if (n > 0) {
      store_part(y + p * kLanes, sum[p], n);
    }
  }
}

template <class Type, class Tokens>
KILIN_INLINE void panel_tokens(const uint8_t* panel, int64_t cols, const typename Tokens::Block* x, int rows,
                               float* y, int64_t y_stride) {
  constexpr packed::Group kGroup = packed::group(Type::kDtype);
  const int64_t blocks = cols / 32;
  Tokens tokens;
  for (int i = 0; i < Tokens::kCount; ++i) tokens.x[i] = x + i * blocks;
  Rows sum[Tokens::kCount];
  for (auto& token : sum) {
    for (auto& part : token) part = zero();
  }
  for (int64_t b = 0; b < blocks; b += kGroup.columns / 32, panel += kGroup.bytes) {
    Type::add(panel, b, blocks, tokens, sum);
  }
  for (int i = 0; i < Tokens::kCount; ++i) store_rows(sum[i], rows, y + i * y_stride);
}

// Tokens that share the widening of a weight: as many as registers allow.
template <class Type>
constexpr int most_tokens() {
  if (kLanes < 16) return 2;
  return Type::kDtype == Dtype::kQ6_K ? 2 : Type::kDtype == Dtype::kQ4_K ? 4 : 8;
}

template <class Type, bool kAsk, class Block, int M = most_tokens<Type>()>
KILIN_INLINE void tokens_from(const uint8_t* panel, const MatmulJob& job, const Block* x, int64_t t, int rows,
                              float* y) {
  for (; t + M <= job.tokens; t += M) {
    panel_tokens<Type, Tokens<M, Block, kAsk>>(panel, job.w.cols, x + t * (job.w.cols / 32), rows,
                                               y + t * job.y_stride, job.y_stride);
  }
  if constexpr (M > 1) tokens_from<Type, kAsk, Block, M / 2>(panel, job, x, t, rows, y);
}

template <class Type, bool kAsk, class Block>
void all_panels(const MatmulJob& job, PanelRange panels, const Block* x) {
  const auto* base = static_cast<const uint8_t*>(job.w.data);
  const int64_t panel_bytes = packed::panel_bytes(Type::kDtype, job.w.cols);
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t left = job.w.rows - i * packed::kRows;
    tokens_from<Type, kAsk>(base + i * panel_bytes, job, x, 0, static_cast<int>(left < 16 ? left : 16),
                            job.y + i * packed::kRows);
  }
}

template <bool kAsk, class Block>
void dot_types(const MatmulJob& job, PanelRange panels, const Block* x) {
  switch (job.w.dtype) {
    case Dtype::kQ8_0:
      return all_panels<Q8_0, kAsk>(job, panels, x);
    case Dtype::kQ4_0:
      return all_panels<Q4_0, kAsk>(job, panels, x);
    case Dtype::kQ4_K:
      return all_panels<Q4_K, kAsk>(job, panels, x);
    default:
      return all_panels<Q6_K, kAsk>(job, panels, x);
  }
}

template <class Block>
void dot_blocks(const MatmulJob& job, PanelRange panels, const Block* x) {
  prefetches_streams() ? dot_types<false>(job, panels, x) : dot_types<true>(job, panels, x);
}

}  // namespace
}  // namespace kilin::KILIN_ISA
