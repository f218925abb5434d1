// SPDX-License-Identifier: Apache-2.0
// Private to kernels/mla: the two orders behind mla.h.
#pragma once
#include "kernels/mla/mla.h"

namespace kilin {

// The absorbed order for several sequences whose new tokens lie one after another.
void mla_absorb(const MlaParams& params, const MlaSequence* sequences, int64_t count, ThreadPool& pool);
void mla_expand(const MlaParams& params, const MlaSequence& sequence, ThreadPool& pool);
// The expanded order where mla_rounds().
void mla_expand_rounded(const MlaParams& params, const MlaSequence& sequence, ThreadPool& pool);
// Cache rows [begin, end) of a sequence as float32, rows mla_padded(latent + rope) apart.
void mla_load_latents(const MlaParams& params, const MlaSequence& sequence, int64_t begin, int64_t end,
                      float* to, ThreadPool& pool);

}  // namespace kilin
