// SPDX-License-Identifier: Apache-2.0
// The per-ISA pieces of matmul.cc. Rows are those of packed panels; y points at the job's first row.
#pragma once
#include "kernels/cpu/dispatch.h"
#include "kernels/matmul/matmul.h"

namespace kilin {

// 32 activations as integers: x_i = scale v_i, |v_i| <= 32,512, within scale / 2. With VNNI the bytes are the
// 32 low parts and the 32 high parts (v = 256 high + low, both signed); elsewhere 32 int16, in every group of
// four in the order 0 2 1 3. sums: of v over the first and the second half, for weights with an offset.
struct ActivationBlock {
  int8_t bytes[64];
  float scale;
  int32_t sums[2];
  float total;  // scale (sums[0] + sums[1])
};

// 32 activations as x_i = scale v_i, |v_i| <= 127, within scale / 2; the other members as in ActivationBlock.
struct ByteBlock {
  int8_t bytes[32];
  float scale;
  int32_t sums[2];
  float total;
};

// Panels [begin, end) of w.
struct PanelRange {
  int64_t begin, end;
};
// Tokens [begin, end) of a job.
struct TokenRange {
  int64_t begin, end;
};

}  // namespace kilin

// quantize_activations: cols (a multiple of 32) floats to cols / 32 blocks.
// dot_integers: y for a range of panels of quantised weights; x [tokens][cols / 32].
// dot_floats: the same for F32, F16 and BF16 weights, each weight widened once per few tokens; x as in the
// job. gemm_floats: the same for many tokens: panels are widened to float32 in `scratch`
// (gemm_scratch_floats()), then multiplied by register tiles.
KILIN_DECLARE_ISA(void quantize_activations(const float* x, int64_t cols, ActivationBlock* blocks);
                  void dot_integers(const MatmulJob& job, PanelRange panels, const ActivationBlock* x);
                  void dot_floats(const MatmulJob& job, PanelRange panels);
                  void gemm_floats(const MatmulJob& job, PanelRange panels, TokenRange tokens,
                                   float* scratch);
                  int64_t gemm_panels(); int64_t gemm_scratch_floats();)
