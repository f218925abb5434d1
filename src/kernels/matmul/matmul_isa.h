// SPDX-License-Identifier: Apache-2.0
// The per-ISA pieces of matmul.cc.
#pragma once
#include "kernels/cpu/dispatch.h"
#include "kernels/matmul/matmul.h"

// matmul_rows: y for weight rows [row_begin, row_end) of one job by dot products (job.tokens <=
// kMatmulDotTokens). matmul_panel: y for rows [row_begin, row_end), at most panel_rows() of them, by packing;
// `pack` holds pack_floats() floats.
KILIN_DECLARE_ISA(void matmul_rows(const MatmulJob& job, int64_t row_begin, int64_t row_end);
                  void matmul_panel(const MatmulJob& job, int64_t row_begin, int64_t row_end, float* pack);
                  int64_t matmul_panel_rows(); int64_t matmul_pack_floats();
                  void widen(const WeightMatrix& w, int64_t row, float* out);)
