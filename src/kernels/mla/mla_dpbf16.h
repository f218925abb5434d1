// SPDX-License-Identifier: Apache-2.0
// Latent attention with rounded activations by vdpbf16ps (AVX-512): queries, keys, softmax weights and values
// are bfloat16, scores, the softmax and sums float32. Only where base/cpu.h's fast_bf16_products() says so.
#pragma once
#include "kernels/mla/mla_isa.h"

namespace kilin::dpbf16 {

// Expanded keys lie in panels of so many, values in panels of as many columns: two registers a unit.
inline constexpr int64_t kPanel = 32;
// Keys between two steps of the running softmax, and queries that go over a block of keys together.
inline constexpr int64_t kKeyStep = 128;
inline constexpr int64_t kQueryStep = 96;

constexpr int64_t panels_of(int64_t values) { return (values + kPanel - 1) / kPanel; }

// A block of keys of all heads, multiplied out. A unit is two values of each of kPanel neighbours: of the
// depth for a key, of two keys for a value. Zeros where there is no key, depth or value.
struct Keys {
  int64_t begin, end;  // keys of the sequence
  int64_t capacity;    // that the memory below has for each head, a multiple of kKeyStep
  uint16_t* keys;      // [heads][capacity / kPanel][depth / 2][kPanel][2], depth whole panels of nope + rope
  uint16_t* values;    // [heads][panels_of(value)][capacity / 2][kPanel][2]
};
constexpr int64_t keys_values(const MlaParams& p) {  // of a key
  return p.heads * kPanel * (panels_of(p.nope + p.rope) + panels_of(p.value));
}

// kPanel keys from key `row` of the block on (a multiple of kPanel), `rows` of which exist.
struct KeyRows {
  int64_t head, row, rows;
  const float* keys;     // [rows][nope]: W_UK c
  const float* values;   // [rows][mla_padded(value)]: W_UV c
  const float* latents;  // [rows][mla_padded(latent + rope)]
};
void pack_keys(const MlaParams& p, const Keys& keys, const KeyRows& from);

// As mla_expanded_block(); at most kQueryStep queries, queries.scratch holds query_floats(). Tops are in
// units of log2.
void expanded_block(const MlaParams& p, const Keys& keys, const MlaQueries& queries);
constexpr int64_t query_floats(const MlaParams& p) {
  const int64_t depth = panels_of(p.nope + p.rope) * kPanel;
  return kQueryStep *
         ((depth + kPanel) / 2 + kKeyStep + (kKeyStep + kPanel) / 2 + panels_of(p.value) * kPanel + 16);
}

// The core of the absorbed order, as mla_piece(), for float16 and bfloat16 caches whose rows are whole
// vectors.
constexpr bool piece_fits(const MlaParams& p) {
  return p.cache_type != Dtype::kF32 && p.latent % kPanel == 0 && p.rope % 16 == 0;
}
void piece(const MlaPiece& piece);
int64_t piece_floats(const MlaParams& params, int64_t rows);

// Packed float32 weights (matmul/layout.h) as packed BF16 ones, `to` of packed_bytes(kBF16).
void round_weights(const WeightMatrix& w, void* to);

}  // namespace kilin::dpbf16
