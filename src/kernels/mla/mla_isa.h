// SPDX-License-Identifier: Apache-2.0
// The per-ISA pieces of mla.cc. Scratch pointers come from the caller; sizes in floats by the functions named
// *_floats.
#pragma once
#include "kernels/cpu/dispatch.h"
#include "kernels/mla/mla.h"

// mla_absorb_query: q_absorbed[latent + rope] = [q_nope W_UK[h] | q_rope]; row: [latent] scratch
// mla_absorb_piece: queries [rows][latent + rope] against cache rows [begin, end) with row r seeing keys
//   < visible[r]; context [rows][latent_padded], top and sum [rows] are the piece's partial softmax
// mla_merge_value: o[value] from `pieces` partial results of one query row
// mla_expand_block: queries [q_begin, q_end) of one sequence and head, all keys
KILIN_DECLARE_ISA(void mla_absorb_query(const MlaParams& p, int64_t head, const float* q, float* q_absorbed,
                                        float* row);
                  void mla_absorb_piece(const MlaParams& p, const MlaSequence& s, int64_t rows,
                                        const float* queries, const int64_t* visible, int64_t begin,
                                        int64_t end, float* context, float* top, float* sum, float* scores);
                  void mla_merge_value(const MlaParams& p, int64_t head, int64_t pieces, const float* context,
                                       int64_t context_stride, const float* top, const float* sum,
                                       int64_t top_stride, float* merged, float* out);
                  void mla_expand_block(const MlaParams& p, const MlaSequence& s, int64_t head,
                                        int64_t q_begin, int64_t q_end, float* scratch);
                  int64_t mla_expand_floats(const MlaParams& p, int64_t queries);
                  int64_t mla_padded(int64_t n);)
