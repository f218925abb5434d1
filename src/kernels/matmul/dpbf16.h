// SPDX-License-Identifier: Apache-2.0
// Products of BF16 weights with many tokens by vdpbf16ps (AVX-512): activations are rounded to bfloat16, sums
// are float32. Twice as fast as float32 multiply-adds where base/cpu.h's fast_bf16_products() says so.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/matmul/matmul.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::dpbf16 {

// Tokens of one piece of work: their activations and sums stay in the second-level cache.
inline constexpr int64_t kBlockTokens = 256;
inline constexpr int64_t kMostBlockTokens = 384;

// Values of a row of rounded activations: whole units of 32 columns, and a line more, because rows a power of
// two apart would fight for the same lines of the cache.
int64_t row_values(int64_t cols);
// `cols` floats to row_values(cols) bfloat16 to nearest, ties to even, zeros behind them.
void round_row(const float* x, int64_t cols, uint16_t* to);

// y for panels [begin, end) and at most kMostBlockTokens tokens of a job with BF16 weights; x
// [tokens][row_values] from the job's first token on; the rest as in vnni.h.
void matmul_halves(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const uint16_t* x,
                   std::byte* scratch);
int64_t scratch_bytes();

}  // namespace kilin::dpbf16
