// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 and AMX (cmake/isa.cmake); runs only where base/cpu.h found both.
//
// A block of 64 keys is split into bfloat16 terms a few columns at a time, 8 or 16 KB that stay in the
// first-level cache: as rows of keys for the scores, which are computed transposed (keys x rows), and again
// as pairs of keys for the contexts. (Splitting the whole block once for both takes less arithmetic, but its
// 280 KB go to the second-level cache and back: four times slower.) Up to 8 rows put both terms of a query,
// or of the softmax weights, side by side into one tile and add the halves afterwards; more rows take a tile
// per term and leave out the product of the two low terms.
#include "kernels/mla/mla_amx.h"

#include "kernels/cpu/amx_tiles.h"
#include "kernels/mla/mla_amx_terms.h"

namespace kilin::amx {
namespace {

constexpr int64_t kPairedRows = 8;  // up to here both terms in one tile

struct Layout {
  int64_t chunks;      // of 32 columns of latent + rope
  int64_t row_tiles;   // of 16 rows
  int64_t queries;     // floats: [row tiles][chunks][high, low] tiles of pairs of columns x 16 rows
  int64_t stage;       // terms of keys: [key tiles][high, low] or [key groups][4][high, low] tiles
  int64_t transposed;  // [2 row tiles][64 keys][16 rows]
  int64_t scores;      // [16 row_tiles][64 keys]
  int64_t weights;     // [row tiles][key groups][high, low] tiles of 16 rows x 32 keys
  int64_t context;     // [row tiles][latent / 16] tiles of 16 rows x 16 latents
};

Layout layout(const MlaParams& p, int64_t rows) {
  Layout l{};
  l.chunks = (p.latent + p.rope) / 32;
  l.row_tiles = (rows + 15) / 16;
  l.queries = l.row_tiles * l.chunks * 2 * kTile;
  l.stage = kKeyGroups * 4 * 2 * kTile;
  l.transposed = 2 * kMlaKeyBlock * 16;
  l.scores = l.row_tiles * 16 * kMlaKeyBlock;
  l.weights = l.row_tiles * kKeyGroups * 2 * kTile;
  l.context = l.row_tiles * (p.latent / 16) * kTile;
  return l;
}

// Pair i of chunk c holds columns 32 c + i and 32 c + 16 + i, here and in the rows of keys.
void split_queries(const MlaPiece& t, const Layout& l, float* to) {
  const int64_t stride = mla_padded(t.params->latent + t.params->rope);
  const bool paired = t.rows <= kPairedRows;
  std::memset(to, 0, static_cast<size_t>(l.queries) * sizeof(float));
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < l.chunks; ++c) {
      const float* q = t.queries + r * stride + 32 * c;
      const Terms terms = split(load(q), load(q + 16));
      float* high = to + (r / 16 * l.chunks + c) * 2 * kTile + r % 16;
      float* low = paired ? high + kPairedRows : high + kTile;
      for (int i = 0; i < 16; ++i) {
        std::memcpy(high + i * 16, reinterpret_cast<const char*>(&terms.high) + 4 * i, 4);
        std::memcpy(low + i * 16, reinterpret_cast<const char*>(&terms.low) + 4 * i, 4);
      }
    }
  }
}

// transposed[key][row] of one tile of rows with both terms side by side
void paired_scores(const Layout& l, int64_t latent_chunks, const float* queries, const Keys& keys,
                   float* stage, float* transposed) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < l.chunks; ++c) {
    split_rows(keys, 0, kKeyTiles, c, c >= latent_chunks, stage);
    _tile_loadd(4, queries + c * 2 * kTile, 64);
    _tile_loadd(5, stage, 64);
    _tile_loadd(6, stage + 2 * kTile, 64);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(7, stage + 4 * kTile, 64);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(5, stage + 6 * kTile, 64);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(6, stage + kTile, 64);
    _tile_dpbf16ps(3, 5, 4);
    _tile_loadd(7, stage + 3 * kTile, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, stage + 5 * kTile, 64);
    _tile_dpbf16ps(1, 7, 4);
    _tile_loadd(6, stage + 7 * kTile, 64);
    _tile_dpbf16ps(2, 5, 4);
    _tile_dpbf16ps(3, 6, 4);
  }
  _tile_stored(0, transposed, 64);
  _tile_stored(1, transposed + kTile, 64);
  _tile_stored(2, transposed + 2 * kTile, 64);
  _tile_stored(3, transposed + 3 * kTile, 64);
}

// The same for two tiles of rows (kSecond: or one), a term each, [row tile][key][row]
template <bool kSecond>
void wide_scores(const Layout& l, int64_t latent_chunks, const float* queries, const Keys& keys, float* stage,
                 float* transposed) {
  const float* second = queries + l.chunks * 2 * kTile;
  for (int64_t k = 0; k < kKeyTiles; k += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < l.chunks; ++c) {
      split_rows(keys, 16 * k, 2, c, c >= latent_chunks, stage);
      _tile_loadd(4, queries + c * 2 * kTile, 64);
      _tile_loadd(5, stage, 64);
      _tile_loadd(6, stage + 2 * kTile, 64);
      _tile_dpbf16ps(0, 5, 4);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, queries + c * 2 * kTile + kTile, 64);
      _tile_dpbf16ps(0, 5, 7);
      _tile_dpbf16ps(1, 6, 7);
      if constexpr (kSecond) {
        _tile_loadd(7, second + c * 2 * kTile, 64);
        _tile_dpbf16ps(2, 5, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_loadd(7, second + c * 2 * kTile + kTile, 64);
        _tile_dpbf16ps(2, 5, 7);
        _tile_dpbf16ps(3, 6, 7);
      }
      _tile_loadd(5, stage + kTile, 64);
      _tile_loadd(6, stage + 3 * kTile, 64);
      _tile_dpbf16ps(0, 5, 4);
      _tile_dpbf16ps(1, 6, 4);
      if constexpr (kSecond) {
        _tile_loadd(7, second + c * 2 * kTile, 64);
        _tile_dpbf16ps(2, 5, 7);
        _tile_dpbf16ps(3, 6, 7);
      }
    }
    float* to = transposed + k * kTile;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kTile, 64);
    if constexpr (kSecond) {
      _tile_stored(2, to + kKeyTiles * kTile, 64);
      _tile_stored(3, to + (kKeyTiles + 1) * kTile, 64);
    }
  }
}

void turn_scores(bool paired, const float* transposed, float* scores) {
  for (int64_t i = 0; i < kKeyTiles; ++i) {
    Vec rows[16];
    for (int k = 0; k < 16; ++k) rows[k] = load(transposed + i * kTile + k * 16);
    transpose(rows);
    for (int r = 0; r < (paired ? 8 : 16); ++r) {
      store(scores + r * kMlaKeyBlock + i * 16, paired ? rows[r] + rows[r + 8] : rows[r]);
    }
  }
}

// Softmax weights of a row as A rows, keys in the order of the pairs.
void split_weights(bool paired, int64_t row, const float* scores, float* to) {
  for (int64_t g = 0; g < kKeyGroups; ++g) {
    const Terms terms = split(load(scores + 32 * g), load(scores + 32 * g + 16));
    float* high = to + g * 2 * kTile + row * 16;
    put(high, terms.high);
    put(paired ? high + kPairedRows * 16 : high + kTile, terms.low);
  }
}

// 4 tiles of contexts of one tile of rows
template <bool kPaired>
void context_tiles(const float* weights, const float* stage, float* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kTile, 64);
  _tile_loadd(2, c + 2 * kTile, 64);
  _tile_loadd(3, c + 3 * kTile, 64);
  for (int64_t g = 0; g < kKeyGroups; ++g) {
    const float* b = stage + g * 8 * kTile;
    _tile_loadd(4, weights + g * 2 * kTile, 64);
    if constexpr (!kPaired) _tile_loadd(5, weights + (g * 2 + 1) * kTile, 64);
#define KILIN_CONTEXT(i)                           \
  _tile_loadd(6, b + (i)*2 * kTile, 64);           \
  _tile_loadd(7, b + (i)*2 * kTile + kTile, 64);   \
  _tile_dpbf16ps(i, 4, 6);                         \
  if constexpr (!kPaired) _tile_dpbf16ps(i, 5, 6); \
  _tile_dpbf16ps(i, 4, 7);
    KILIN_CONTEXT(0)
    KILIN_CONTEXT(1)
    KILIN_CONTEXT(2)
    KILIN_CONTEXT(3)
#undef KILIN_CONTEXT
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTile, 64);
  _tile_stored(2, c + 2 * kTile, 64);
  _tile_stored(3, c + 3 * kTile, 64);
}

void scale_context(bool paired, int64_t tiles, int64_t row, float factor, float* context) {
  const Vec f = splat(factor);
  for (int64_t n = 0; n < tiles; ++n) {
    float* at = context + n * kTile + row * 16;
    store(at, load(at) * f);
    if (paired) store(at + kPairedRows * 16, load(at + kPairedRows * 16) * f);
  }
}

void write_contexts(const MlaPiece& t, const float* context) {
  const int64_t latent = t.params->latent;
  const bool paired = t.rows <= kPairedRows;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* tiles = context + r / 16 * (latent / 16) * kTile + r % 16 * 16;
    for (int64_t n = 0; n < latent / 16; ++n) {
      for (int64_t j = 0; j < 16; ++j) {
        const float high = tiles[n * kTile + j];
        const float low = paired ? tiles[n * kTile + kPairedRows * 16 + j] : 0.0f;
        t.context[r * mla_padded(latent) + n * 16 + j] = high + low;
      }
    }
  }
}

}  // namespace

int64_t mla_piece_floats(const MlaParams& p, int64_t rows) {
  const Layout l = layout(p, rows);
  return l.queries + l.stage + l.transposed + l.scores + l.weights + l.context;
}

void mla_piece(const MlaPiece& t) {
  const MlaParams& p = *t.params;
  const Layout l = layout(p, t.rows);
  const bool paired = t.rows <= kPairedRows;
  const int64_t tiles = p.latent / 16;
  float* queries = t.scratch;
  float* stage = queries + l.queries;
  float* transposed = stage + l.stage;
  float* scores = transposed + l.transposed;
  float* weights = scores + l.scores;
  float* context = weights + l.weights;
  alignas(64) const TileConfig config;
  _tile_loadconfig(&config);
  split_queries(t, l, queries);
  std::memset(weights, 0, static_cast<size_t>(l.weights) * sizeof(float));
  std::memset(context, 0, static_cast<size_t>(l.context) * sizeof(float));
  for (int64_t r = 0; r < t.rows; ++r) {
    t.top[r] = kMinusInfinity;
    t.sum[r] = 0;
  }
  const int64_t row_bytes = p.page_stride * 2;
  const auto cache_at = [&](int64_t key) {
    return static_cast<const char*>(t.pages[key / p.page_tokens]) + key % p.page_tokens * row_bytes;
  };
  for (int64_t j = t.begin; j < t.end; j += kMlaKeyBlock) {
    Keys keys{cache_at(j), nullptr, row_bytes, least(kMlaKeyBlock, t.end - j)};
    const char* next = j + kMlaKeyBlock < t.end ? cache_at(j + kMlaKeyBlock) : nullptr;
    for (int64_t g = 0; g < l.row_tiles; g += 2) {
      const float* q = queries + g * l.chunks * 2 * kTile;
      keys.next = g == 0 ? next : nullptr;
      if (paired) {
        paired_scores(l, p.latent / 32, q, keys, stage, transposed);
      } else if (g + 1 < l.row_tiles) {
        wide_scores<true>(l, p.latent / 32, q, keys, stage, transposed);
      } else {
        wide_scores<false>(l, p.latent / 32, q, keys, stage, transposed);
      }
      for (int64_t i = g; i < least(g + 2, l.row_tiles); ++i) {
        turn_scores(paired, transposed + (i - g) * kKeyTiles * kTile, scores + i * 16 * kMlaKeyBlock);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      float* row = scores + r * kMlaKeyBlock;
      const float correction =
          softmax_step(least(keys.count, t.visible[r] - j), kMlaKeyBlock, p.scale, row, t.top[r], t.sum[r]);
      const int64_t g = r / 16;
      if (correction != 1.0f) scale_context(paired, tiles, r % 16, correction, context + g * tiles * kTile);
      split_weights(paired, r % 16, row, weights + g * kKeyGroups * 2 * kTile);
    }
    keys.next = next;
    for (int64_t n = 0; n < tiles; n += 4) {
      split_pairs(keys, n * 16, stage);
      for (int64_t g = 0; g < l.row_tiles; ++g) {
        const float* terms = weights + g * kKeyGroups * 2 * kTile;
        float* sums = context + (g * tiles + n) * kTile;
        paired ? context_tiles<true>(terms, stage, sums) : context_tiles<false>(terms, stage, sums);
      }
    }
  }
  _tile_release();
  write_contexts(t, context);
}

}  // namespace kilin::amx
