// SPDX-License-Identifier: Apache-2.0
// The core of the absorbed order on Intel's tile matrix unit (AMX, bfloat16), for float16 caches. A float16
// latent is exactly the sum of two bfloat16 terms; queries and softmax weights are rounded to two terms
// (2^-17 of each).
#pragma once
#include "kernels/mla/mla_isa.h"

namespace kilin::amx {

constexpr bool mla_fits(const MlaParams& p) {
  return p.cache_type == Dtype::kF16 && p.latent % 64 == 0 && p.rope % 32 == 0;
}
// As mla_piece(); piece.scratch holds mla_piece_floats().
void mla_piece(const MlaPiece& piece);
int64_t mla_piece_floats(const MlaParams& params, int64_t rows);

}  // namespace kilin::amx
