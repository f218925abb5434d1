// SPDX-License-Identifier: Apache-2.0
// The ceiling for kernels that read and rewrite a large array in place.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace kilin {

// Multiplies `chunks` times 64 KB of floats by a number, in several ways:
//   0 registers, a CTA per chunk      1 the same with streaming hints      2 bulk copies through shared
//   memory, persistent CTAs, 16 KB stages     3 the same, 32 KB stages             4 registers, 32 KB per
//   CTA, streaming hints
void rewrite_probe(int way, float* data, int64_t chunks, CUstream_st* stream);
inline constexpr int kRewriteWays = 5;

}  // namespace kilin
