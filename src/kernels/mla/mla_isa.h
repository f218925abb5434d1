// SPDX-License-Identifier: Apache-2.0
// The per-ISA parts of kernels/mla. All scratch comes from the caller.
#pragma once
#include "kernels/cpu/dispatch.h"
#include "kernels/mla/mla.h"

namespace kilin {

// Rows of floats in scratch are padded to whole vectors of the widest instruction set, with zeros or numbers.
constexpr int64_t mla_padded(int64_t n) { return (n + 15) / 16 * 16; }
// Query rows are computed in tiles of so many; score and context memory has rows for whole tiles.
inline constexpr int64_t kMlaRowTile = 8;
constexpr int64_t mla_padded_rows(int64_t rows) {
  return (rows + kMlaRowTile - 1) / kMlaRowTile * kMlaRowTile;
}
// Keys of a panel of transposed keys in the expanded order.
inline constexpr int64_t kMlaPanelKeys = 32;
// Queries handled at once in the expanded order.
inline constexpr int64_t kMlaQueryBlock = 96;

// Absorbed: query rows against the keys [begin, end) of one sequence. begin is a multiple of kMlaKeyBlock.
struct MlaPiece {
  const MlaParams* params;
  const void* const* pages;
  int64_t begin, end;
  int64_t ahead;  // first key of the piece that this thread will probably take next, -1: not known
  int64_t rows;
  const float* queries;    // [rows][mla_padded(latent + rope)], zeros in the padding
  const int64_t* visible;  // [rows] keys that the row sees
  float* context;          // [mla_padded_rows(rows)][mla_padded(latent)]: sums of e^(score - top) c
  float* top;              // [rows] highest score times scale
  float* sum;              // [rows] sums of e^(score - top)
  float* scratch;          // [mla_piece_floats()]
};
constexpr int64_t mla_piece_floats(const MlaParams& p, int64_t rows) {
  return kMlaKeyBlock * (mla_padded(p.latent + p.rope) + mla_padded_rows(rows));
}

// Expanded: one block of keys of all heads, multiplied out.
struct MlaKeys {
  int64_t begin, end;  // keys of the sequence
  int64_t capacity;    // rows and panels that the memory below has for each head, a multiple of kMlaPanelKeys
  const float* latents;  // [end - begin][mla_padded(latent + rope)]
  const float* keys;     // [heads][capacity][nope]: W_UK c
  float* panels;         // [heads][capacity / kMlaPanelKeys][nope + rope][kMlaPanelKeys]: keys transposed
  const float* values;   // [heads][capacity][mla_padded(value)]: W_UV c
};
// Running softmax of queries [q_begin, q_end) of one head; out holds the sums until the last block of keys.
struct MlaQueries {
  const MlaSequence* sequence;
  int64_t head, q_begin, q_end;
  float* top;      // [q_end - q_begin]
  float* sum;      // [q_end - q_begin]
  float* scratch;  // [mla_query_floats()]
};
constexpr int64_t mla_query_floats(const MlaParams& p) {
  return kMlaQueryBlock * (mla_padded(p.nope + p.rope) + kMlaKeyBlock);
}

}  // namespace kilin

// mla_piece: one piece of the absorbed order
// mla_merge: merged[latent] = sum over pieces of a row, divided by the sum of its weights
// mla_load_rows: n cache rows as float32, `to` rows mla_padded(width) apart with zeros behind them
// mla_pack_panel: panel `panel` of keys of one head from keys and latents
// mla_expanded_block: the queries against the block of keys
KILIN_DECLARE_ISA(void mla_piece(const MlaPiece& piece);
                  void mla_merge(int64_t latent, int64_t pieces, const float* context, int64_t context_stride,
                                 const float* top, const float* sum, int64_t top_stride, float* merged);
                  bool mla_store_half(int64_t n, const float* row, void* to);
                  void mla_load_rows(Dtype type, int64_t n, int64_t width, const void* from, int64_t stride,
                                     float* to);
                  void mla_pack_panel(const MlaParams& p, const MlaKeys& keys, int64_t head, int64_t panel);
                  void mla_expanded_block(const MlaParams& p, const MlaKeys& keys,
                                          const MlaQueries& queries);)
