// SPDX-License-Identifier: Apache-2.0
// Products with quantised weights: integer dot products per block of 32, scaled and summed in float32. Lane r
// of every vector belongs to row r of a panel, so nothing is summed across lanes; activations are broadcast.
#include "kernels/matmul/integers.h"
#include "kernels/matmul/layout.h"
#if defined(__AVX512VNNI__)
#include "kernels/matmul/matmul_simd.h"
#endif

namespace kilin::KILIN_ISA {
namespace {

constexpr float kLevels = 32512.0f;  // 127 * 256: both bytes stay within -128..127

// Lanes of a panel's 16 rows, as vectors.
using Rows = Vec[kParts];

template <int M>
struct Tokens {
  const ActivationBlock* x[M];  // of each token, block 0
};

// Asks for the weights 4 KB on into the second-level cache (the first level has too few outstanding misses to
// cover the latency of memory), and for those 1 KB on into the first: docs/notes/20261124-cpu-matmul.md has
// what was tried.
KILIN_INLINE void prefetch_ahead(const uint8_t* p) {
  __builtin_prefetch(p + 4096, 0, 2);
  __builtin_prefetch(p + 1024, 0, 3);
}

template <int M>
KILIN_INLINE void start(Dot (&dots)[M][kParts], const Tokens<M>& tokens, int64_t b, int offset) {
  for (int t = 0; t < M; ++t) {
    const ActivationBlock& x = tokens.x[t][b];
    for (int p = 0; p < kParts; ++p) dots[t][p] = dot_start(-offset * (x.sums[0] + x.sums[1]));
  }
}

// sum[t] += d scale_t (sum over block b of 32 of w v), for Q8_0 and Q4_0
template <int M>
KILIN_INLINE void add_scaled(const Dot (&dots)[M][kParts], const uint8_t* scales, const Tokens<M>& tokens,
                             int64_t b, Rows (&sum)[M]) {
  for (int p = 0; p < kParts; ++p) {
    const Vec d = load_f16(scales + 2 * p * kLanes);
    for (int t = 0; t < M; ++t) sum[t][p] += dot_end(dots[t][p]) * (d * splat(tokens.x[t][b].scale));
  }
}

// Types add to sum[t] the products of one group of columns, whose first block of activations is b; of Q8_0
// and Q4_0 the last group may have one block only.
struct Q8_0 {
  static constexpr Dtype kDtype = Dtype::kQ8_0;
  template <int M>
  KILIN_INLINE void add_block(const uint8_t* scales, const uint8_t* units, int64_t b, const Tokens<M>& tokens,
                              Rows (&sum)[M]) {
    Dot dots[M][kParts];
    start<M>(dots, tokens, b, 128);
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      prefetch_ahead(units + u * packed::kUnitBytes);
      for (int p = 0; p < kParts; ++p) {
        const VecUint w = load_unit(units + u * packed::kUnitBytes + 4 * p * kLanes);
        for (int t = 0; t < M; ++t) dot_group(dots[t][p], w, tokens.x[t][b], u);
      }
    }
    add_scaled<M>(dots, scales, tokens, b, sum);
  }
  template <int M>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t blocks, const Tokens<M>& tokens,
                        Rows (&sum)[M]) {
    prefetch_ahead(group);
    add_block<M>(group, group + 64, b, tokens, sum);
    if (b + 1 < blocks) add_block<M>(group + 32, group + 64 + 8 * packed::kUnitBytes, b + 1, tokens, sum);
  }
};

struct Q4_0 {
  static constexpr Dtype kDtype = Dtype::kQ4_0;
  template <int M>
  KILIN_INLINE void add_block(const uint8_t* scales, const uint8_t* units, int64_t b, const Tokens<M>& tokens,
                              Rows (&sum)[M]) {
    Dot dots[M][kParts];
    start<M>(dots, tokens, b, 8);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      prefetch_ahead(units + u * packed::kUnitBytes);
      for (int p = 0; p < kParts; ++p) {
        const VecUint w = load_unit(units + u * packed::kUnitBytes + 4 * p * kLanes);
        const VecUint low = w & 0x0f0f0f0fu;
        const VecUint high = (w >> 4) & 0x0f0f0f0fu;
        for (int t = 0; t < M; ++t) {
          dot_group(dots[t][p], low, tokens.x[t][b], u);
          dot_group(dots[t][p], high, tokens.x[t][b], u + 4);
        }
      }
    }
    add_scaled<M>(dots, scales, tokens, b, sum);
  }
  template <int M>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t blocks, const Tokens<M>& tokens,
                        Rows (&sum)[M]) {
    prefetch_ahead(group);
    add_block<M>(group, group + 64, b, tokens, sum);
    if (b + 1 < blocks) add_block<M>(group + 32, group + 64 + 4 * packed::kUnitBytes, b + 1, tokens, sum);
  }
};

struct Q4_K {
  static constexpr Dtype kDtype = Dtype::kQ4_K;
  // 64 columns: two parts of the group, which begin with block b of the activations
  template <int M>
  KILIN_INLINE void add_parts(const uint8_t* group, const uint8_t* parts, const uint8_t* units, int64_t b,
                              const Tokens<M>& tokens, Rows (&sum)[M]) {
    Dot dots[2][M][kParts];
    for (auto& half : dots) {
      for (int t = 0; t < M; ++t) {
        for (int p = 0; p < kParts; ++p) half[t][p] = dot_start(0);
      }
    }
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      prefetch_ahead(units + u * packed::kUnitBytes);
      for (int p = 0; p < kParts; ++p) {
        const VecUint w = load_unit(units + u * packed::kUnitBytes + 4 * p * kLanes);
        const VecUint low = w & 0x0f0f0f0fu;
        const VecUint high = (w >> 4) & 0x0f0f0f0fu;
        for (int t = 0; t < M; ++t) {
          dot_group(dots[0][t][p], low, tokens.x[t][b], u);
          dot_group(dots[1][t][p], high, tokens.x[t][b + 1], u);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* part = parts + half * 32;
      for (int p = 0; p < kParts; ++p) {
        const Vec scale = load_f16(group + 2 * p * kLanes) * load_u8(part + p * kLanes);
        const Vec least = load_f16(group + 32 + 2 * p * kLanes) * load_u8(part + 16 + p * kLanes);
        for (int t = 0; t < M; ++t) {
          const ActivationBlock& x = tokens.x[t][b + half];
          sum[t][p] += dot_end(dots[half][t][p]) * (scale * splat(x.scale));
          sum[t][p] -= least * splat(x.total);
        }
      }
    }
  }
  template <int M>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t, const Tokens<M>& tokens, Rows (&sum)[M]) {
    for (int i = 0; i < 5; ++i) prefetch_ahead(group + i * 64);
    for (int i = 0; i < 4; ++i) {
      add_parts<M>(group, group + 64 + i * 64, group + 320 + i * 8 * packed::kUnitBytes, b + 2 * i, tokens,
                   sum);
    }
  }
};

struct Q6_K {
  static constexpr Dtype kDtype = Dtype::kQ6_K;
  // 16 columns of each quarter of half a group: units 4 side to 4 side + 3
  template <int M>
  KILIN_INLINE void add_side(const uint8_t* group, const uint8_t* units, int half, int side, int64_t b,
                             const Tokens<M>& tokens, Rows (&sum)[M]) {
    for (int p = 0; p < kParts; ++p) {
      Dot dots[4][M];
      for (int quarter = 0; quarter < 4; ++quarter) {
        for (int t = 0; t < M; ++t) dots[quarter][t] = dot_start(-32 * tokens.x[t][b + quarter].sums[side]);
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
          for (int t = 0; t < M; ++t) dot_group(dots[quarter][t], w[quarter], tokens.x[t][b + quarter], u);
        }
      }
      const Vec d = load_f16(group + 2 * p * kLanes);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const Vec scale = d * load_i8(group + 32 + (half * 8 + quarter * 2 + side) * 16 + p * kLanes);
        for (int t = 0; t < M; ++t) {
          sum[t][p] += dot_end(dots[quarter][t]) * (scale * splat(tokens.x[t][b + quarter].scale));
        }
      }
    }
  }
  template <int M>
  KILIN_INLINE void add(const uint8_t* group, int64_t b, int64_t, const Tokens<M>& tokens, Rows (&sum)[M]) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* units = group + 320 + half * 24 * packed::kUnitBytes;
      for (int i = 0; i < 24; ++i) prefetch_ahead(units + i * packed::kUnitBytes);
      for (int side = 0; side < 2; ++side) add_side<M>(group, units, half, side, b + 4 * half, tokens, sum);
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

template <class Type, int M>
KILIN_INLINE void panel_tokens(const uint8_t* panel, int64_t cols, const ActivationBlock* x, int64_t t,
                               int rows, float* y, int64_t y_stride) {
  constexpr packed::Group kGroup = packed::group(Type::kDtype);
  const int64_t blocks = cols / 32;
  Tokens<M> tokens;
  for (int i = 0; i < M; ++i) tokens.x[i] = x + (t + i) * blocks;
  Rows sum[M];
  for (auto& token : sum) {
    for (auto& part : token) part = zero();
  }
  for (int64_t b = 0; b < blocks; b += kGroup.columns / 32, panel += kGroup.bytes) {
    Type::template add<M>(panel, b, blocks, tokens, sum);
  }
  for (int i = 0; i < M; ++i) store_rows(sum[i], rows, y + (t + i) * y_stride);
}

// Tokens that share the widening of a weight: as many as registers allow.
template <class Type>
constexpr int most_tokens() {
  if (kLanes < 16) return 2;
  return Type::kDtype == Dtype::kQ6_K ? 2 : Type::kDtype == Dtype::kQ4_K ? 4 : 8;
}

template <class Type, int M = most_tokens<Type>()>
KILIN_INLINE void tokens_from(const uint8_t* panel, const MatmulJob& job, const ActivationBlock* x, int64_t t,
                              int rows, float* y) {
  for (; t + M <= job.tokens; t += M) panel_tokens<Type, M>(panel, job.w.cols, x, t, rows, y, job.y_stride);
  if constexpr (M > 1) tokens_from<Type, M / 2>(panel, job, x, t, rows, y);
}

template <class Type>
void all_panels(const MatmulJob& job, PanelRange panels, const ActivationBlock* x) {
  const auto* base = static_cast<const uint8_t*>(job.w.data);
  const int64_t panel_bytes = packed::panel_bytes(Type::kDtype, job.w.cols);
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t left = job.w.rows - i * packed::kRows;
    tokens_from<Type>(base + i * panel_bytes, job, x, 0, static_cast<int>(left < 16 ? left : 16),
                      job.y + i * packed::kRows);
  }
}

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
  switch (job.w.dtype) {
    case Dtype::kQ8_0:
      return all_panels<Q8_0>(job, panels, x);
    case Dtype::kQ4_0:
      return all_panels<Q4_0>(job, panels, x);
    case Dtype::kQ4_K:
      return all_panels<Q4_K>(job, panels, x);
    default:
      return all_panels<Q6_K>(job, panels, x);
  }
}

}  // namespace kilin::KILIN_ISA
