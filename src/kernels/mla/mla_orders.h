// SPDX-License-Identifier: Apache-2.0
// Private to kernels/mla: the two orders behind mla.h.
#pragma once
#include "kernels/mla/mla.h"

namespace kilin {

// The absorbed order for several sequences whose new tokens lie one after another.
void mla_absorb(const MlaParams& params, const MlaSequence* sequences, int64_t count, ThreadPool& pool);
void mla_expand(const MlaParams& params, const MlaSequence& sequence, ThreadPool& pool);

}  // namespace kilin
