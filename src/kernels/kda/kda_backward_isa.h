// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda: the gradient kernel that is compiled once per instruction set, and its memory.
#pragma once
#include <cstdint>

#include "kernels/cpu/dispatch.h"
#include "kernels/kda/kda_backward.h"
#include "kernels/kda/kda_isa.h"

namespace kilin {

// A unit of parallel work: all value heads of one query and key head of one sequence.
struct KdaBackwardTask {
  int sequence;
  int head;
  int piece_chunks;  // chunks of a sequence between whose states the memory suffices
  float* scratch;    // kda_backward_scratch_floats(), 64-byte aligned
  // [value heads of the head][kda_backward_sum_floats()]: sums over the tokens, of the gradients of a_log
  // (first) and dt_bias
  float* sums;
};

// Sizes for every instruction set, in floats (rows = K rounded up to 16, columns = V to the widest panel).
struct KdaBackwardSizes {
  int64_t rows;
  int64_t columns;
  explicit KdaBackwardSizes(const KdaParams& p)
      : rows(kda_round_up(p.key_dim, 16)), columns(kda_round_up(p.value_dim, kKdaMaxPanel)) {}
  int64_t state() const { return rows * columns; }
  // Of a chunk: the state before it, v - (k D) S^T, L and P
  int64_t chunk() const { return state() + kKdaChunk * columns + 2 * kKdaChunk * kKdaChunk; }
  // Everything else: struct BackwardChunk in kda_backward_simd.h, the forward operands, a gradient of the
  // state
  int64_t work() const { return state() + 288 * rows + 7168; }
};

inline int64_t kda_backward_sum_floats(const KdaParams& p) {
  return 1 + (p.scalar_gate ? 1 : static_cast<int64_t>(p.key_dim));
}

inline int64_t kda_backward_scratch_floats(const KdaParams& p, int64_t piece_chunks, int64_t pieces) {
  const KdaBackwardSizes sizes(p);
  return sizes.work() + piece_chunks * sizes.chunk() + pieces * sizes.state();
}

}  // namespace kilin

KILIN_DECLARE_ISA(void kda_backward_task(const KdaBackwardParams& params, const KdaBackwardTask& task);)
