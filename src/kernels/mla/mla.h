// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention over a cache of latents. Per token the cache holds [c | p]: the normed latent c
// (latent values) and the key part p (rope values) that all heads share, as float16, bfloat16 or float32.
// With W_UK[h] (nope x latent) and W_UV[h] (value x latent) the rows of kv_b_proj that belong to head h:
//   score_hj = ((q_nope W_UK[h]) . c_j + q_rope . p_j) scale,   a = softmax_j<=t(score),   o_h = W_UV[h]
//   sum_j a_hj c_j
// Two orders of the same sums: `absorbed` multiplies W_UK into the query (few queries: the cache is the
// traffic, and it is read once for all heads and queries), `expanded` multiplies the latents out to keys and
// values once per call (many queries: fewer products in all).
#pragma once
#include <cstdint>

#include "base/thread_pool.h"
#include "kernels/matmul/matmul.h"

namespace kilin {

// Keys handled at once; pages of the cache hold a multiple of it.
inline constexpr int64_t kMlaKeyBlock = 64;

struct MlaSequence {
  int64_t first = 0;  // its new tokens are rows [first, first + count) of q and out
  int64_t count = 0;
  int64_t past = 0;                    // tokens before them in the cache
  const void* const* pages = nullptr;  // page i holds cache rows [i * page_tokens, (i + 1) * page_tokens)
};

struct MlaParams {
  int64_t heads = 0, nope = 0, rope = 0, value = 0, latent = 0;
  float scale = 1.0f;
  Dtype cache_type = Dtype::kF16;  // kF16, kBF16 or kF32
  int64_t page_tokens = 0;         // a multiple of kMlaKeyBlock
  int64_t page_stride = 0;         // elements between cache rows, >= latent + rope
  int64_t sequences = 0;
  const MlaSequence* sequence = nullptr;   // [sequences]; rows past + count are in the cache already
  const float* q = nullptr;                // [tokens][heads][nope + rope]
  const WeightMatrix* k_absorb = nullptr;  // [heads], each [latent][nope]: W_UK[h]^T
  const WeightMatrix* k_expand = nullptr;  // [heads], each [nope][latent]: W_UK[h]
  const WeightMatrix* value_up = nullptr;  // [heads], each [value][latent]: W_UV[h]
  float* out = nullptr;                    // [tokens][heads][value]
  // Where mla_rounds() says so of the type of value_up, queries, keys or latents, softmax weights and values
  // are bfloat16, in the absorbed order with a float16 or bfloat16 cache only; sums and the softmax stay
  // float32.
  Activations activations = Activations::kExact;
};

// Whether it is computed in bfloat16 with kv_b_proj of this type: where rounds() says so and the machine
// multiplies faster so (AVX-512 without AMX, fast_bf16_products()).
bool mla_rounds(Dtype weights, Activations activations);

// Queries of one sequence from which the expanded order is used.
int64_t mla_expand_threshold(const MlaParams& params);

// Sums do not depend on the number of threads, nor on the other sequences of the call. Throws Error for a
// cache type or a page layout that is not supported.
void mla_attention(const MlaParams& params, ThreadPool& pool);
// The two orders by themselves, for tests and measurements.
void mla_absorbed(const MlaParams& params, const MlaSequence& sequence, ThreadPool& pool);
void mla_expanded(const MlaParams& params, const MlaSequence& sequence, ThreadPool& pool);

// Multiply-adds (counted as two operations) and bytes of the cache and of the weights that one call of either
// order needs, without recomputation: the floor that measurements are held against.
double mla_absorbed_flops(const MlaParams& params, const MlaSequence& sequence);
double mla_expanded_flops(const MlaParams& params, const MlaSequence& sequence);
double mla_cache_bytes(const MlaParams& params, const MlaSequence& sequence);

// Writes a cache row: `width` floats to `to` in the cache's type. False, with the row written all the same,
// if a finite value became infinite (beyond 65,519 in float16, 3.39e38 in bfloat16).
bool mla_store_row(Dtype cache_type, int64_t width, const float* row, void* to);
// The row back as float32.
void mla_load_row(Dtype cache_type, int64_t width, const void* from, float* row);

// Rotary position embedding on interleaved pairs (DeepSeek-V3's layout): for pair i of x[dim],
// (x_2i, x_2i+1) turned by position * theta^(-2i / dim). rows of `stride` floats, positions[row].
void rope_interleaved(int64_t rows, int64_t dim, double theta, const int64_t* positions, float* x,
                      int64_t stride);

}  // namespace kilin
