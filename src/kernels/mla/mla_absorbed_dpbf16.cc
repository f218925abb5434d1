// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 (cmake/isa.cmake); runs only where base/cpu.h found it with bfloat16. The core of the
// absorbed order with all of its operands rounded to bfloat16: as mla_absorbed_isa.cc, with two values of the
// width (scores) or two keys (contexts) a step. Latents go from float16 to bfloat16 in registers, if they are
// not kept so.
#include "kernels/mla/mla_dpbf16.h"
#include "kernels/mla/mla_dpbf16_simd.h"

namespace kilin::dpbf16 {
namespace {

constexpr int kRows = 8;  // of a register tile; 16 sums with two keys, or two vectors of a context
constexpr int kStep = 2 * kLanes;
constexpr int64_t kWeightStride = kMlaKeyBlock + kStep;
// Lines of the next block that a tile of scores asks for; one of contexts asks for one a pair of keys.
constexpr int64_t kScoreLines = 20;
static_assert(kMlaRowTile == kRows);

struct Work {
  uint16_t* queries;  // [padded rows][whole_steps(width)]
  float* scores;      // [padded rows][kMlaKeyBlock]
  uint16_t* weights;  // [padded rows][kWeightStride]
  float* sums;        // [rows][kLanes]
  float* tops;        // [rows]
};

// Rows of the cache, and the lines of the next block that were not asked for yet.
struct Block {
  const char* cache;
  int64_t row_bytes, keys;
  const char* ahead;
  const char* ahead_end;
  const char* key(int64_t j) const { return cache + least(j, keys - 1) * row_bytes; }
  // The first of the next n lines, or nullptr. Lines behind the block's end may be asked for: no harm.
  const char* take(int64_t n) {
    if (ahead >= ahead_end) return nullptr;
    const char* first = ahead;
    ahead += n * 64;
    return first;
  }
};
constexpr int64_t whole_steps(int64_t width) { return (width + kStep - 1) / kStep * kStep; }
KILIN_INLINE void ask(const char* line) { __builtin_prefetch(line, 0, 2); }

// How latents are kept: 32 of them, or 16 and zeros, as bfloat16 in order.
struct Halves {
  KILIN_INLINE __m512i load_step(const char* p) { return round_pairs(load_f16(p), load_f16(p + 32)); }
  KILIN_INLINE __m512i load_half(const char* p) { return round_pairs(load_f16(p), zero()); }
};
struct BFloats {
  KILIN_INLINE __m512i load_step(const char* p) { return _mm512_loadu_si512(p); }
  KILIN_INLINE __m512i load_half(const char* p) { return _mm512_maskz_loadu_epi16(0xffff, p); }
};

// scores[r][0..2) = q[r] . keys 0 and 1; rows of q whole steps, zeros behind the width, which may end
// half-way
template <class Type, bool kPrefetch>
KILIN_INLINE void score_tile(int64_t width, const uint16_t* q, const char* key0, const char* key1,
                             float* scores, const char* ahead) {
  __m512 acc[2 * kRows];
#pragma GCC unroll 16
  for (__m512& sum : acc) sum = _mm512_setzero_ps();
  if constexpr (kPrefetch) {
    for (int64_t i = width / kStep; i < kScoreLines; ++i) ask(ahead + i * 64);
  }
  const int64_t stride = whole_steps(width);
  const auto step = [&](int64_t c, __m512i k0, __m512i k1) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh query = load_pairs(q + r * stride + c);
      acc[2 * r] = _mm512_dpbf16_ps(acc[2 * r], pairs_of(k0), query);
      acc[2 * r + 1] = _mm512_dpbf16_ps(acc[2 * r + 1], pairs_of(k1), query);
    }
  };
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    step(c, Type::load_step(key0 + 2 * c), Type::load_step(key1 + 2 * c));
    if constexpr (kPrefetch) ask(ahead + 2 * c);
  }
  if (c < width) step(c, Type::load_half(key0 + 2 * c), Type::load_half(key1 + 2 * c));
  Vec sums[2 * kRows];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) sums[i] = reinterpret_cast<Vec>(acc[i]);
  float all[2 * kRows];
  store(all, reduce_lanes(sums));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kMlaKeyBlock, all + 2 * r, 2 * sizeof(float));
}

// context[r][0..32) += sum over keys of weights[r][key] latents[key], the 32 values in the order of lanes():
// of eight, four in the first vector and four in the second
template <class Type, bool kPrefetch>
KILIN_INLINE void context_tile(const Block& block, int64_t column, const uint16_t* weights, float* context,
                               int64_t context_stride, const char* ahead) {
  __m512 acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = _mm512_loadu_ps(context + r * context_stride);
    acc[r][1] = _mm512_loadu_ps(context + r * context_stride + kLanes);
  }
  const char* const first = block.cache + 2 * column;
  const int64_t last = block.keys - 1;
  for (int64_t j = 0; j <= last; j += 2) {
    const __m512i k0 = Type::load_step(first + j * block.row_bytes);
    const __m512i k1 = Type::load_step(first + least(j + 1, last) * block.row_bytes);
    const __m512bh low = pairs_of(_mm512_unpacklo_epi16(k0, k1));
    const __m512bh high = pairs_of(_mm512_unpackhi_epi16(k0, k1));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh weight = splat_pair(weights + r * kWeightStride + j);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, weight);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, weight);
    }
    if constexpr (kPrefetch) ask(ahead + j * 32);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(context + r * context_stride, acc[r][0]);
    _mm512_storeu_ps(context + r * context_stride + kLanes, acc[r][1]);
  }
}

// context_tile()'s order back to that of the columns
void order_contexts(int64_t rows, int64_t columns, float* context) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < rows * columns; i += kStep) {
    const __m512 low = _mm512_loadu_ps(context + i);
    const __m512 high = _mm512_loadu_ps(context + i + kLanes);
    _mm512_storeu_ps(context + i, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(context + i + kLanes, _mm512_permutex2var_ps(low, second, high));
  }
}

Block block_at(const MlaPiece& t, int64_t begin) {
  const MlaParams& p = *t.params;
  Block b{};
  b.keys = least(kMlaKeyBlock, t.end - begin);
  b.row_bytes = p.page_stride * 2;
  const auto cache_at = [&](int64_t key) {
    return static_cast<const char*>(t.pages[key / p.page_tokens]) + key % p.page_tokens * b.row_bytes;
  };
  b.cache = cache_at(begin);
  const int64_t next = begin + kMlaKeyBlock < t.end ? begin + kMlaKeyBlock : t.ahead;
  if (next >= 0) {
    b.ahead = cache_at(next);
    b.ahead_end = b.ahead + kMlaKeyBlock * b.row_bytes;
  }
  return b;
}

template <class Type>
void block_scores(const MlaPiece& t, Block& block, const Work& w) {
  const int64_t width = t.params->latent + t.params->rope;
  for (int64_t r = 0; r < t.rows; r += kRows) {
    const uint16_t* q = w.queries + r * whole_steps(width);
    for (int64_t j = 0; j < block.keys; j += 2) {
      float* scores = w.scores + r * kMlaKeyBlock + j;
      const char* lines = block.take(kScoreLines);
      if (lines != nullptr) {
        score_tile<Type, true>(width, q, block.key(j), block.key(j + 1), scores, lines);
      } else {
        score_tile<Type, false>(width, q, block.key(j), block.key(j + 1), scores, nullptr);
      }
    }
  }
}

template <class Type>
void block_contexts(const MlaPiece& t, Block& block, const Work& w) {
  const int64_t columns = t.params->latent;
  for (int64_t r = 0; r < t.rows; r += kRows) {
    const uint16_t* weights = w.weights + r * kWeightStride;
    for (int64_t c = 0; c < columns; c += kStep) {
      float* context = t.context + r * columns + c;
      const char* lines = block.take((block.keys + 1) / 2);
      if (lines != nullptr) {
        context_tile<Type, true>(block, c, weights, context, columns, lines);
      } else {
        context_tile<Type, false>(block, c, weights, context, columns, nullptr);
      }
    }
  }
}

Work begin_piece(const MlaPiece& t) {
  const MlaParams& p = *t.params;
  const int64_t width = p.latent + p.rope;
  const int64_t stride = mla_padded(width);
  const int64_t padded = mla_padded_rows(t.rows);
  Work w{};
  w.scores = t.scratch;
  w.sums = w.scores + padded * kMlaKeyBlock;
  w.tops = w.sums + padded * kLanes;
  w.weights = reinterpret_cast<uint16_t*>(w.tops + mla_padded(padded));
  w.queries = w.weights + padded * kWeightStride;
  for (int64_t r = 0; r < padded; ++r) {
    const float* from = t.queries + least(r, t.rows - 1) * stride;
    for (int64_t c = 0; c < width; c += kStep) {
      const Vec second = c + kLanes < width ? load(from + c + kLanes) : zero();
      _mm512_storeu_si512(w.queries + r * whole_steps(width) + c, round_pairs(load(from + c), second));
    }
    w.tops[r] = kMinusInfinity;
    store(w.sums + r * kLanes, zero());
  }
  for (int64_t i = 0; i < padded * p.latent; i += kLanes) store(t.context + i, zero());
  std::memset(w.weights, 0, static_cast<size_t>(padded * kWeightStride) * sizeof(uint16_t));
  return w;
}

}  // namespace

int64_t piece_floats(const MlaParams& p, int64_t rows) {
  const int64_t padded = mla_padded_rows(rows);
  return padded * (kMlaKeyBlock + kLanes + (kWeightStride + whole_steps(p.latent + p.rope)) / 2) +
         mla_padded(padded);
}

namespace {

template <class Type>
void piece_of(const MlaPiece& t) {
  const MlaParams& p = *t.params;
  const Work w = begin_piece(t);
  for (int64_t j = t.begin; j < t.end; j += kMlaKeyBlock) {
    Block block = block_at(t, j);
    block_scores<Type>(t, block, w);
    for (int64_t r = 0; r < t.rows; ++r) {
      const SoftmaxRow row{w.tops + r, w.sums + r * kLanes, t.context + r * p.latent, p.latent};
      uint16_t* weights = w.weights + r * kWeightStride;
      const int64_t visible = least(block.keys, t.visible[r] - j);
      if (visible > 0) {
        softmax_row<kMlaKeyBlock / kLanes>(visible, kLog2E * p.scale, w.scores + r * kMlaKeyBlock, row,
                                           weights);
      } else {
        std::memset(weights, 0, kMlaKeyBlock * sizeof(uint16_t));
      }
    }
    block_contexts<Type>(t, block, w);
  }
  order_contexts(t.rows, p.latent, t.context);
  for (int64_t r = 0; r < t.rows; ++r) {
    t.top[r] = w.tops[r] / kLog2E;
    t.sum[r] = reduce_add(load(w.sums + r * kLanes));
  }
}

}  // namespace

void piece(const MlaPiece& t) {
  t.params->cache_type == Dtype::kBF16 ? piece_of<BFloats>(t) : piece_of<Halves>(t);
}

}  // namespace kilin::dpbf16
