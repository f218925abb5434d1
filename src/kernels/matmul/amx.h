// SPDX-License-Identifier: Apache-2.0
// Products with many tokens by AMX (Intel's tile matrix unit, bfloat16). A float32 activation becomes two
// bfloat16 terms, high + low; a weight one (BF16) or two (all others), and the products high x high, low x
// high, high x low are summed in float32: relative error below 2^-15 per product.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/matmul/matmul.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::amx {

// Tokens of an A tile, and columns of a tile of A or B.
inline constexpr int64_t kTileTokens = 16;
inline constexpr int64_t kTileColumns = 32;
// Tokens of one piece of work: about 256, whose terms (4 bytes per value) stay in L2, in equal parts. Every
// piece widens its weights anew, so that an expert with a few more must not make a second one.
inline constexpr int64_t kMostBlockTokens = 384;
constexpr int64_t block_tokens(int64_t tokens) {
  const int64_t blocks = tokens < kMostBlockTokens ? 1 : (tokens + 128) / 256;
  return ((tokens + blocks - 1) / blocks + 31) / 32 * 32;
}

// Bytes of the terms of `tokens` rows: [token tiles][chunks of 32 columns][high, low][16][32] bfloat16.
int64_t split_bytes(int64_t tokens, int64_t cols);
// The terms of token tile `tile`, at its place in `split`; tokens and columns that are not there become 0.
// x_rows as in MatmulJob. `stream`: written past the caches.
void split_activations(const float* x, int64_t x_stride, const int32_t* x_rows, int64_t tokens, int64_t cols,
                       int64_t tile, bool stream, std::byte* split);

// y for panels [begin, end) and tokens [first, last) of a job (first a multiple of kTileTokens); `scratch`
// holds scratch_bytes(), 64-byte aligned. `stream`: y is written past the caches where its rows are aligned.
void matmul_tiles(const MatmulJob& job, PanelRange panels, int64_t first, int64_t last, bool stream,
                  const std::byte* split, std::byte* scratch);
int64_t scratch_bytes();

}  // namespace kilin::amx
