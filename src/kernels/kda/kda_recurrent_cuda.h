// SPDX-License-Identifier: Apache-2.0
// The recurrence itself on an NVIDIA GPU, token by token: for what the chunked form and the decode step do
// not take, float32 inputs and head dimensions up to 256. Sums in float32. A token costs about a microsecond
// however few sequences there are, so the chunked form is the one for long prompts.
#pragma once
#include "kernels/kda/kda_cuda.h"

namespace kilin {

// params as for kda_chunk_cuda, but key_dim and value_dim from 1 to 256, type also kF32, rows at any
// alignment of their elements; without chunk_states; plan is not looked at. No workspace. Throws Error when
// the arguments do not fit or the launch fails.
void kda_recurrent_cuda(const KdaCudaParams& params, CUstream_st* stream);

}  // namespace kilin
