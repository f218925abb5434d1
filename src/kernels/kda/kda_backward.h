// SPDX-License-Identifier: Apache-2.0
// Gradients of Kimi Delta Attention on the CPU, fp32: the adjoint of kda.h, for training. From
//     dO = dloss/d(out)  and  dS = dloss/d(final state)
// it makes the gradients of q, k, v, gate and beta as the caller passed them (before l2norm, gate and
// sigmoid), of a_log, dt_bias and the initial state. Formulas: docs/math/kda.md; how it is computed here:
// kda_backward_isa.cc.
#pragma once
#include <cstdint>

#include "kernels/kda/kda.h"

namespace kilin {

// Strides are floats from one token's row to the next, as in KdaParams. Every gradient is overwritten, not
// added to; with null it is not wanted.
struct KdaBackwardParams {
  // The arguments of the forward pass. `state` is the initial state, as it was before the forward pass, and
  // is only read (null: zeros); `out` and `out_stride` are not used.
  KdaParams forward;

  const float* d_out = nullptr;  // [T][HV * V]
  int64_t d_out_stride = 0;
  // [slots][HV][V][K], the slots of the forward pass: the gradient of the final state in, of the initial
  // state out. Null: the first is zero, the second not wanted. Slots of empty sequences stay as they are:
  // there the two are the same.
  float* d_state = nullptr;
  int64_t d_slot_stride = 0;  // floats, at least HV * V * K

  float* d_q = nullptr;     // [T][H * K], summed over the value heads of a head
  float* d_k = nullptr;     // [T][H * K], likewise
  float* d_v = nullptr;     // [T][HV * V]
  float* d_gate = nullptr;  // [T][HV * K], with scalar_gate [T][HV]
  float* d_beta = nullptr;  // [T][HV]; of the logit with beta_is_logit
  int64_t d_q_stride = 0;
  int64_t d_k_stride = 0;
  int64_t d_v_stride = 0;
  int64_t d_gate_stride = 0;
  int64_t d_beta_stride = 0;
  float* d_a_log = nullptr;    // [HV], summed over all tokens; must be null with kNone
  float* d_dt_bias = nullptr;  // [HV * K], with scalar_gate [HV]; likewise

  // What a thread may use for states between chunks; sequences that need more are computed forward twice. At
  // least one chunk is kept whatever is said here.
  int64_t memory_per_thread = int64_t{40} << 20;
};

// Throws Error when an argument does not fit.
void validate(const KdaBackwardParams& params);

// Checks its arguments. The bits do not depend on the number of threads; one (sequence, head) is the work of
// one thread. Memory per thread, kept for the next call: about K V + 300 K + 7,000 floats, and per 16
// tokens K V + 16 V + 512 floats (K rounded up to 16, V to 32: 75 KB for 128 x 128), which for a long
// sequence end at memory_per_thread (8,600 tokens for 128 x 128); beyond it K V floats for each such piece of
// the sequence.
void kda_backward(const KdaBackwardParams& params, ThreadPool& pool);

// Floating point operations of it (counted as in kda_chunk_flops): 16 K V per token and head, of which 4 K V
// are the forward pass again, and per pair of a chunk (j < i) 15 K + 10 V.
double kda_backward_flops(const KdaParams& params);

}  // namespace kilin
