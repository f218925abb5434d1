// SPDX-License-Identifier: Apache-2.0
// What the CPU operators share (ops.cc defines it).
#pragma once
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "base/thread_pool.h"
#include "kernels/kda/kda.h"

namespace kilin::torch_ops {

// The pool of this process.
ThreadPool& thread_pool();

// [N + 1] token offsets, checked: from 0 to T, rising.
std::vector<int32_t> sequence_bounds(const OptionalTensor& cu_seqlens, int64_t sequences, int64_t length,
                                     int64_t tokens);
inline std::vector<int32_t> sequence_bounds(const Inputs& in, const Shape& shape) {
  return sequence_bounds(in.cu_seqlens, shape.sequences, shape.length, shape.tokens());
}

// 0, 1, ... count - 1
std::vector<int32_t> slots_in_order(int64_t count);

// The kernels' arguments but for cu_seqlens, slots, state and out. Checks types and strides.
KdaParams cpu_params(const Inputs& in, const Shape& shape);

}  // namespace kilin::torch_ops
