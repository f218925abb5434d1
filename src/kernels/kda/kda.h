// SPDX-License-Identifier: Apache-2.0
// Kimi Delta Attention (KDA) on the CPU, forward only, fp32. Gated DeltaNet is the case of a scalar gate.
//
// Per sequence and value head hv (query/key head h = hv / (HV / H)), with the state S as a V x K matrix:
//     S   <- S diag(e^g_t)                 decay, one factor per key channel (or one for all: scalar_gate)
//     d_t  = beta_t (v_t - S k_t)          delta rule, S already decayed
//     S   <- S + d_t k_t^T
//     o_t  = S (scale q_t)
// Before it, when asked for:
//     l2norm         x / sqrt(sum x^2 + 1e-6) of every q and k
//     gate_kind      kSoftplus  g = -e^A_log softplus(x + dt_bias), softplus linear above 20
//                    kBounded   g = lower_bound sigmoid(e^A_log (x + dt_bias))
//                    kNone      g = x, a natural logarithm of a decay, finite and <= 0
//     beta_is_logit  beta = sigmoid(x)
// Sources: Kimi Linear technical report, arXiv:2510.26692, section 3; Gated DeltaNet, arXiv:2412.06464; the
// chunked form of the delta rule, arXiv:2406.06484. How it is computed here: kda_chunk_isa.cc.
#pragma once
#include <cstdint>

namespace kilin {

class ThreadPool;

enum class KdaGate { kSoftplus, kBounded, kNone };

// T tokens of all sequences lie one after another (packed batch). A stride is the number of floats from one
// token's row to the next, so that q, k, v, gate and beta may be slices of one projection; within a row they
// are contiguous.
struct KdaParams {
  int heads = 0;        // H: query and key heads
  int value_heads = 0;  // HV: a multiple of H
  int key_dim = 0;      // K: 1 to 256
  int value_dim = 0;    // V: 1 to 256
  int sequences = 0;    // N
  const int32_t* cu_seqlens =
      nullptr;                     // [N + 1] sequence n has the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1
  const int32_t* slots = nullptr;  // [N] state slot of each sequence, all different
  const float* q = nullptr;        // [T][H * K]
  const float* k = nullptr;        // [T][H * K]
  const float* v = nullptr;        // [T][HV * V]
  const float* gate = nullptr;     // [T][HV * K], with scalar_gate [T][HV]
  const float* beta = nullptr;     // [T][HV]
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  int64_t gate_stride = 0;
  int64_t beta_stride = 0;
  KdaGate gate_kind = KdaGate::kSoftplus;
  bool scalar_gate = false;
  float lower_bound = -5.0f;       // kBounded only, negative
  const float* a_log = nullptr;    // [HV]; null means zeros; not used by kNone
  const float* dt_bias = nullptr;  // [HV * K], with scalar_gate [HV]; null means zeros; not used by kNone
  bool l2norm = true;
  bool beta_is_logit = false;
  float scale = 1.0f;       // of q, usually K^-1/2
  float* state = nullptr;   // [slots][HV][V][K]: initial state in, final state out
  int64_t slot_stride = 0;  // floats from one slot to the next, at least HV * V * K
  float* out = nullptr;     // [T][HV * V]; must not overlap any input
  int64_t out_stride = 0;
};

// Throws Error when a dimension, a pointer, a stride, a length or a slot number does not fit.
void validate(const KdaParams& params);

// Token by token, any length: the decode step. Reads and writes the state once per token.
void kda_recurrent(const KdaParams& params, ThreadPool& pool);
// Sixteen tokens at a time as matrix products: prefill.
void kda_chunk(const KdaParams& params, ThreadPool& pool);
// Either of them for every sequence by its length; what a model calls.
void kda_forward(const KdaParams& params, ThreadPool& pool);
// All three check their arguments, leave slots of empty sequences and slots that are not named untouched,
// give the same bits for any number of threads, and compute every sequence as if it were alone. Scratch
// memory is one buffer per thread of about 4 K V + 56 K floats (1.2 MB at most), whatever the lengths, kept
// for the next call.

// Tokens that kda_chunk handles together.
inline constexpr int kKdaChunk = 16;
// Shortest sequence for which kda_forward takes the chunked form (measured:
// docs/notes/20261123-kda-cpu-chunk.md).
inline constexpr int kKdaChunkFrom = 6;

// Floating point operations of the chunked form on these shapes (a multiply-add counts 2, exp and gates not
// counted): 6 K V per token and head, and inside a chunk of n tokens n (n - 1) / 2 pairs (j < i) of 5 K + 4 V
// each plus the n diagonal terms of P.
double kda_chunk_flops(const KdaParams& params);
// Of the recurrence: 7 K V per token and head.
double kda_recurrent_flops(const KdaParams& params);
// Bytes that have to move between memory and the kernel at least once: inputs, output, states in and out.
double kda_bytes(const KdaParams& params);

}  // namespace kilin
