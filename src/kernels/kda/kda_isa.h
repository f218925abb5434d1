// SPDX-License-Identifier: Apache-2.0
// Private to kernels/kda: the entry points that are compiled once per instruction set.
#pragma once
#include <cstdint>

#include "kernels/cpu/dispatch.h"
#include "kernels/kda/kda.h"

namespace kilin {

// A unit of parallel work: the values [value_begin, value_end) of `head_count` value heads of one sequence,
// from value_head on. Every value row of the state evolves on its own, so that any split gives the same bits.
struct KdaTask {
  int sequence;
  int value_head;
  int head_count;
  int value_begin;
  int value_end;
};
// Neighbouring heads go through a sequence together: their rows share memory pages.
inline constexpr int kKdaHeadGroup = 4;

}  // namespace kilin

KILIN_DECLARE_ISA(
    // scratch: kda_scratch_floats() floats, 64-byte aligned
    void kda_recurrent_task(const KdaParams& params, const KdaTask& task, float* scratch);
    void kda_chunk_task(const KdaParams& params, const KdaTask& task, float* scratch);)

namespace kilin {

// Enough for every instruction set (the widest panel is 32 values): struct Chunk in kda_chunk_isa.cc.
inline constexpr int kKdaMaxPanel = 32;
inline constexpr int kKdaOperandStride = 256 + 16;  // the widest key and a line
static inline constexpr int64_t kda_round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
static inline constexpr int64_t kda_scratch_floats(int key_dim, int value_dim, int head_count) {
  const int64_t keys = kda_round_up(key_dim, 16);
  const int64_t values = kda_round_up(value_dim, kKdaMaxPanel);
  return head_count * keys * values + 3 * kKdaChunk * kKdaOperandStride + 8 * keys +
         kKdaChunk * (2 * kKdaChunk + 1 + kKdaMaxPanel);
}

}  // namespace kilin
