// SPDX-License-Identifier: Apache-2.0
// The absorbed order: query rows [rows][width = latent + rope] against cache rows, block by block of
// kMlaKeyBlock keys. Per key and row 2 latent + rope multiply-adds; with 8 rows that takes as long as reading
// the key, so both products run in register tiles, and their steps ask for the lines of the block after this
// one.
#include "kernels/mla/mla_simd.h"

namespace kilin::KILIN_ISA {
namespace {

// Scores: kScoreRows x kScoreKeys sums with the lanes along the width, added across lanes at the end.
// Contexts: kContextRows rows x up to kContextVectors vectors of latents, one key per step. Each tile turns
// the cache's float16 into floats by itself, in registers: writing them to memory for all rows cost more
// (docs/notes/20261125-cpu-vs-llama-cpp.md).
inline constexpr int kScoreRows = 4;
inline constexpr int kScoreKeys = kRegisters == 32 ? 4 : 2;
inline constexpr int kScoreSets = kScoreRows * kScoreKeys / kLanes;  // of sums that are added across lanes
inline constexpr int kContextRows = kRegisters == 32 ? 8 : 4;
inline constexpr int kContextVectors = kRegisters == 32 ? 2 : 3;
// Without an instruction for that, and where rows are not whole vectors, they are copied to floats, so many
// at a time: 8 x 576 are 18 KB.
#if defined(__F16C__)
inline constexpr bool kReadsHalves = true;
#else
inline constexpr bool kReadsHalves = false;
#endif
inline constexpr int64_t kWidenedKeys = 8;
// Row tiles behind this row do not prefetch: the block's lines are spread over the work of the first ones.
inline constexpr int64_t kPrefetchRows = 8;

static_assert(kMlaRowTile % kScoreRows == 0 && kMlaRowTile % kContextRows == 0);
static_assert(kScoreRows * kScoreKeys % kLanes == 0);

// The lines of the next block of keys that were not asked for yet.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  // The first of the next n lines, or nullptr. Lines behind the block's end may be asked for: that does no
  // harm.
  const char* take(int64_t n) {
    if (at >= end) return nullptr;
    const char* first = at;
    at += n * 64;
    return first;
  }
};
KILIN_INLINE void ask(const char* line) { __builtin_prefetch(line, 0, 2); }

// How rows of keys are stored.
struct Floats {
  static constexpr int64_t kBytes = 4;
  KILIN_INLINE Vec load_at(const char* row, int64_t c) {
    return load(reinterpret_cast<const float*>(row) + c);
  }
};
struct Halves {
  static constexpr int64_t kBytes = 2;
  KILIN_INLINE Vec load_at(const char* row, int64_t c) { return load_f16(row + 2 * c); }
};
struct BFloats {
  static constexpr int64_t kBytes = 2;
  KILIN_INLINE Vec load_at(const char* row, int64_t c) { return load_bf16(row + 2 * c); }
};

// scores[r][k] = q[r] . key[k] over `width` values, whole vectors; a line of `ahead` every other step
template <class Type, bool kPrefetch>
KILIN_INLINE void score_tile(int64_t width, const float* const (&q)[kScoreRows],
                             const char* const (&key)[kScoreKeys], float* scores, const char* ahead) {
  Vec acc[kScoreSets][kLanes];
#pragma GCC unroll 2
  for (auto& set : acc) {
#pragma GCC unroll 16
    for (Vec& sum : set) sum = zero();
  }
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec k[kScoreKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kScoreKeys; ++j) k[j] = Type::load_at(key[j], c);
#pragma GCC unroll 8
    for (int r = 0; r < kScoreRows; ++r) {
      const Vec query = load(q[r] + c);
#pragma GCC unroll 4
      for (int j = 0; j < kScoreKeys; ++j) {
        const int i = r * kScoreKeys + j;
        acc[i / kLanes][i % kLanes] += query * k[j];
      }
    }
    if constexpr (kPrefetch) {
      if (c % (2 * kLanes) == 0) ask(ahead + c / kLanes * 32);
    }
  }
  float sums[kScoreSets * kLanes];
#pragma GCC unroll 2
  for (int s = 0; s < kScoreSets; ++s) store(sums + s * kLanes, reduce_lanes(acc[s]));
#pragma GCC unroll 8
  for (int r = 0; r < kScoreRows; ++r) {
    std::memcpy(scores + r * kMlaKeyBlock, sums + r * kScoreKeys, kScoreKeys * sizeof(float));
  }
}

// context[r][0..kVectors lanes) += sum over keys of weights[r][key] latents[key]; a line of `ahead` each step
template <class Type, int kVectors, bool kPrefetch>
KILIN_INLINE void context_tile(int64_t keys, const float* weights, const char* latents, int64_t stride,
                               float* context, int64_t context_stride, const char* ahead) {
  Vec acc[kContextRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kContextRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(context + r * context_stride + v * kLanes);
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec c[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) c[v] = Type::load_at(latents + j * stride, v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kContextRows; ++r) {
      const Vec w = splat(weights[r * kMlaKeyBlock + j]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] += w * c[v];
    }
    if constexpr (kPrefetch) ask(ahead + j * 64);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kContextRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(context + r * context_stride + v * kLanes, acc[r][v]);
  }
}

// A block of keys: `keys` rows of the cache. Rows that are whole vectors are read as they are; others are
// copied to `widened` a few at a time, which stays in the first-level cache: twice, for scores and for
// contexts.
struct Block {
  int64_t keys;
  const char* cache;  // the first cache row
  int64_t row_bytes;  // between cache rows
  Dtype type;
  float* widened;  // nullptr: the cache is read as it is
};
struct Rows {
  const char* first;
  int64_t stride;  // bytes
};

// Rows [begin, end) of the block, the first `width` values of each, as floats `stride` apart.
KILIN_INLINE Rows widened_rows(const Block& block, int64_t begin, int64_t end, int64_t width,
                               int64_t stride) {
  for (int64_t i = 0; i < end - begin; ++i) {
    widen_row(block.type, width, block.cache + (begin + i) * block.row_bytes, block.widened + i * stride);
  }
  return {reinterpret_cast<const char*>(block.widened), stride * 4};
}

// Scores of all query rows with keys [begin, end) of a block, which `rows` holds.
template <class Type>
KILIN_INLINE void key_scores(const MlaPiece& t, const Rows& rows, int64_t begin, int64_t end, float* scores,
                             Ahead& ahead) {
  const int64_t padded = mla_padded(t.params->latent + t.params->rope);
  for (int64_t r = 0; r < t.rows; r += kScoreRows) {
    const float* q[kScoreRows];
    for (int i = 0; i < kScoreRows; ++i) q[i] = t.queries + least(r + i, t.rows - 1) * padded;
    for (int64_t j = begin; j < end; j += kScoreKeys) {
      const char* key[kScoreKeys];
      for (int k = 0; k < kScoreKeys; ++k)
        key[k] = rows.first + (least(j + k, end - 1) - begin) * rows.stride;
      float* to = scores + r * kMlaKeyBlock + j;
      const char* lines = r < kPrefetchRows ? ahead.take(padded / (2 * kLanes)) : nullptr;
      if (lines != nullptr) {
        score_tile<Type, true>(padded, q, key, to, lines);
      } else {
        score_tile<Type, false>(padded, q, key, to, nullptr);
      }
    }
  }
}

void block_scores(const MlaPiece& t, const Block& block, float* scores, Ahead& ahead) {
  if (block.widened == nullptr) {
    const Rows rows{block.cache, block.row_bytes};
    if (block.type == Dtype::kF16) return key_scores<Halves>(t, rows, 0, block.keys, scores, ahead);
    if (block.type == Dtype::kBF16) return key_scores<BFloats>(t, rows, 0, block.keys, scores, ahead);
    return key_scores<Floats>(t, rows, 0, block.keys, scores, ahead);
  }
  const int64_t width = t.params->latent + t.params->rope;
  for (int64_t first = 0; first < block.keys; first += kWidenedKeys) {
    const int64_t last = least(block.keys, first + kWidenedKeys);
    const Rows rows = widened_rows(block, first, last, width, mla_padded(width));
    key_scores<Floats>(t, rows, first, last, scores, ahead);
  }
}

template <class Type, int kVectors>
KILIN_INLINE void context_columns(int64_t keys, const float* weights, const Rows& rows, int64_t begin,
                                  float* context, int64_t columns, const char* ahead) {
  const char* first = rows.first + begin * Type::kBytes;
  if (ahead != nullptr) {
    context_tile<Type, kVectors, true>(keys, weights, first, rows.stride, context + begin, columns, ahead);
  } else {
    context_tile<Type, kVectors, false>(keys, weights, first, rows.stride, context + begin, columns, nullptr);
  }
}

// Contexts of all query rows with `keys` keys from `first` of a block on, which `rows` holds.
template <class Type>
KILIN_INLINE void key_contexts(const MlaPiece& t, const Rows& rows, int64_t first, int64_t keys,
                               const float* scores, Ahead& ahead) {
  const int64_t columns = mla_padded(t.params->latent);
  for (int64_t r = 0; r < t.rows; r += kContextRows) {
    const float* weights = scores + r * kMlaKeyBlock + first;
    float* context = t.context + r * columns;
    for (int64_t c = 0; c < columns;) {
      const char* lines = r < kPrefetchRows ? ahead.take(keys) : nullptr;
      if (c + kContextVectors * kLanes <= columns) {
        context_columns<Type, kContextVectors>(keys, weights, rows, c, context, columns, lines);
        c += kContextVectors * kLanes;
      } else if (kContextVectors > 2 && c + 2 * kLanes <= columns) {
        context_columns<Type, 2>(keys, weights, rows, c, context, columns, lines);
        c += 2 * kLanes;
      } else {
        context_columns<Type, 1>(keys, weights, rows, c, context, columns, lines);
        c += kLanes;
      }
    }
  }
}

void block_contexts(const MlaPiece& t, const Block& block, const float* scores, Ahead& ahead) {
  if (block.widened == nullptr) {
    const Rows rows{block.cache, block.row_bytes};
    if (block.type == Dtype::kF16) return key_contexts<Halves>(t, rows, 0, block.keys, scores, ahead);
    if (block.type == Dtype::kBF16) return key_contexts<BFloats>(t, rows, 0, block.keys, scores, ahead);
    return key_contexts<Floats>(t, rows, 0, block.keys, scores, ahead);
  }
  const int64_t columns = mla_padded(t.params->latent);
  for (int64_t first = 0; first < block.keys; first += kWidenedKeys) {
    const int64_t keys = least(kWidenedKeys, block.keys - first);
    const Rows rows = widened_rows(block, first, first + keys, t.params->latent, columns);
    key_contexts<Floats>(t, rows, first, keys, scores, ahead);
  }
}

Block block_at(const MlaPiece& t, int64_t begin, float* widened) {
  const MlaParams& p = *t.params;
  const int64_t element = p.cache_type == Dtype::kF32 ? 4 : 2;
  const int64_t width = p.latent + p.rope;
  Block b{};
  b.keys = least(kMlaKeyBlock, t.end - begin);
  b.row_bytes = p.page_stride * element;
  b.cache = static_cast<const char*>(t.pages[begin / p.page_tokens]) + begin % p.page_tokens * b.row_bytes;
  b.type = p.cache_type;
  if (width != mla_padded(width) || (p.cache_type == Dtype::kF16 && !kReadsHalves)) b.widened = widened;
  return b;
}

}  // namespace

void mla_piece(const MlaPiece& t) {
  const MlaParams& p = *t.params;
  const int64_t columns = mla_padded(p.latent);
  float* widened = t.scratch;
  float* scores = widened + kWidenedKeys * mla_padded(p.latent + p.rope);
  const int64_t padded_rows = mla_padded_rows(t.rows);
  for (int64_t i = 0; i < padded_rows * columns; i += kLanes) store(t.context + i, zero());
  for (int64_t i = 0; i < padded_rows * kMlaKeyBlock; i += kLanes) store(scores + i, zero());
  for (int64_t r = 0; r < t.rows; ++r) {
    t.top[r] = kMinusInfinity;
    t.sum[r] = 0;
  }
  for (int64_t j = t.begin; j < t.end; j += kMlaKeyBlock) {
    const Block block = block_at(t, j, widened);
    Ahead ahead;
    const int64_t next = j + kMlaKeyBlock < t.end ? j + kMlaKeyBlock : t.ahead;
    if (next >= 0) {
      const char* lines = block_at(t, next, nullptr).cache;
      ahead = {lines, lines + kMlaKeyBlock * block.row_bytes};
    }
    block_scores(t, block, scores, ahead);
    for (int64_t r = 0; r < t.rows; ++r) {
      const float correction = softmax_step(least(block.keys, t.visible[r] - j), kMlaKeyBlock, p.scale,
                                            scores + r * kMlaKeyBlock, t.top[r], t.sum[r]);
      if (correction != 1.0f) scale_row(columns, correction, t.context + r * columns);
    }
    block_contexts(t, block, scores, ahead);
  }
}

void mla_merge(int64_t latent, int64_t pieces, const float* context, int64_t context_stride, const float* top,
               const float* sum, int64_t top_stride, float* merged) {
  float best = kMinusInfinity;
  for (int64_t i = 0; i < pieces; ++i) best = top[i * top_stride] > best ? top[i * top_stride] : best;
  float total = 0;
  const int64_t columns = mla_padded(latent);
  for (int64_t c = 0; c < columns; c += kLanes) store(merged + c, zero());
  for (int64_t i = 0; i < pieces; ++i) {
    const float factor = exp_one(top[i * top_stride] - best);
    if (factor == 0.0f) continue;  // keys that this row does not see, or that weigh nothing
    total += sum[i * top_stride] * factor;
    const Vec f = splat(factor);
    const float* from = context + i * context_stride;
    for (int64_t c = 0; c < columns; c += kLanes) store(merged + c, load(merged + c) + f * load(from + c));
  }
  const Vec inverse = splat(1.0f / total);
  for (int64_t c = 0; c < columns; c += kLanes) store(merged + c, load(merged + c) * inverse);
}

bool mla_store_half(int64_t n, const float* row, void* to) {
  // a finite value of 65,520 and above rounds to infinity
  const Vec limit = splat(65520.0f);
  const Vec infinite = splat(__builtin_inff());
  VecInt beyond{};
  char* at = static_cast<char*>(to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int part = static_cast<int>(least(n - i, kLanes));
    const Vec v = part == kLanes ? load(row + i) : load_part(row + i, part);
    const Vec magnitude = max(v, -v);
    beyond |= (magnitude >= limit) & (magnitude < infinite);
    if (part == kLanes) {
      store_f16(at + i * 2, v);
    } else {
      store_f16_part(at + i * 2, v, part);
    }
  }
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= beyond[i];
  return any == 0;
}

void mla_load_rows(Dtype type, int64_t n, int64_t width, const void* from, int64_t stride, float* to) {
  const int64_t row_bytes = stride * (type == Dtype::kF32 ? 4 : 2);
  for (int64_t i = 0; i < n; ++i) {
    widen_row(type, width, static_cast<const char*>(from) + i * row_bytes, to + i * mla_padded(width));
  }
}

}  // namespace kilin::KILIN_ISA
