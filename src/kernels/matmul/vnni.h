// SPDX-License-Identifier: Apache-2.0
// Products of quantised weights with many tokens by VNNI (AVX-512's dot products of bytes). A pair of panels
// is unpacked to unsigned bytes once for a block of tokens, 512 columns at a time, which stay in the
// first-level cache while the tokens pass by in register tiles. Activations are the 16-bit integers of
// dot_integers (two bytes, two instructions) or 8-bit ones (one instruction: twice as fast, 256 times
// coarser).
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/matmul/matmul.h"
#include "kernels/matmul/matmul_isa.h"

namespace kilin::vnni {

// Tokens of one piece of work: their activations and sums stay in the second-level cache.
inline constexpr int64_t kBlockTokens = 256;
inline constexpr int64_t kMostBlockTokens = 384;

// cols (a multiple of 32) floats to cols / 32 blocks. A NaN or infinity makes its block's scale NaN.
void quantize_bytes(const float* x, int64_t cols, ByteBlock* blocks);

// y for panels [begin, end) and at most kMostBlockTokens tokens of a job with quantised weights; x
// [rows][cols / 32], of which token t has row t or, if the job has x_rows, row x_rows[t]; `scratch` holds
// scratch_bytes(), 64-byte aligned. `stream`: y is written past the caches where its rows are aligned.
void matmul_bytes(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream,
                  const ActivationBlock* x, std::byte* scratch);
void matmul_bytes(const MatmulJob& job, PanelRange panels, TokenRange tokens, bool stream, const ByteBlock* x,
                  std::byte* scratch);
int64_t scratch_bytes();

// The same for few tokens, all of the job's, each weight read once; x [tokens][cols / 32] in order.
void dot_integers(const MatmulJob& job, PanelRange panels, const ByteBlock* x);

}  // namespace kilin::vnni
