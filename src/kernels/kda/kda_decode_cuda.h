// SPDX-License-Identifier: Apache-2.0
// KDA token by token on Hopper GPUs: decoding, speculative verification, and short pieces of text, in one
// kernel that does per sequence and value head
//     short convolution of q, k, v -> SiLU -> l2norm -> gate, beta -> state update -> output -> gated RMSNorm
// and reads and writes the state once. The convolution and the norm are optional. Conventions (no allocation,
// no synchronisation, graph capture) and layouts as in kda_cuda.h, formulas as in kda.h, conv/short_conv.h
// and norm/norm.h. Between the stages values stay float32.
#pragma once
#include <cstdint>

#include "kernels/cuda/types.h"
#include "kernels/kda/kda.h"
#include "kernels/norm/norm.h"

namespace kilin {

inline constexpr int kKdaDecodeTaps = 4;

// Short convolution in front of q, k and v. Its state holds a sequence's last inputs, oldest first:
// [slot][rows][channels] in the type of q, channels = 2 H K + HV V in the order q | k | v.
struct KdaDecodeConv {
  // Null (all three): no convolution. [channels of q, k, v][4] as in the checkpoint ([channels][1][taps]);
  // the last tap is that of the current token.
  const void* q_weight = nullptr;
  const void* k_weight = nullptr;
  const void* v_weight = nullptr;
  CudaType weight_type = CudaType::kBf16;
  void* state = nullptr;
  int64_t slot_stride = 0;        // elements, at least rows * channels
  int rows = kKdaDecodeTaps - 1;  // with token_slots: at least 3 + token_slot_stride - 1
  const int32_t* slots =
      nullptr;  // [N] on the device; null: slot n. A negative slot reads as zeros, is not written
  bool silu = true;
  // Not 0: weights are [4][tap_stride] float32, a row per tap, oldest input first (vLLM keeps such a copy).
  int64_t tap_stride = 0;
};

// Gated RMSNorm behind the output: out = o / sqrt(mean_v o^2 + eps) * weight * activation(gate).
struct KdaDecodeNorm {
  const void* weight = nullptr;  // [V]; null: no norm
  CudaType weight_type = CudaType::kBf16;
  float eps = 1e-5f;
  CudaTokens gate;  // [T][HV][V] in the type of q; not read with kNone
  GateActivation activation = GateActivation::kSigmoid;
};

struct KdaDecodeCudaParams {
  int heads = 0;        // H
  int value_heads = 0;  // HV, a multiple of H; with a convolution at most 8 H
  int key_dim = 0;      // K = V: 64 or 128
  int value_dim = 0;
  int sequences = 0;   // N
  int64_t tokens = 0;  // T of all sequences together
  // [N + 1] token offsets on the device, rising from 0 to T; null: T / N tokens each. A sequence without
  // tokens has its initial state copied to its final slot. wide_seqlens: int64 instead of int32.
  const void* cu_seqlens = nullptr;
  bool wide_seqlens = false;

  CudaType type =
      CudaType::kBf16;  // of q, k, v, out, the norm's gate and the convolution's state: kBf16 or kF16
  CudaTokens q, k, v;   // [T][H][K], [T][H][K], [T][HV][V]
  CudaTokens gate;      // [T][HV][K]
  CudaType gate_type = CudaType::kBf16;
  CudaTokens beta;  // [T][HV]
  CudaType beta_type = CudaType::kBf16;
  KdaGate gate_kind = KdaGate::kSoftplus;
  float lower_bound = -5.0f;       // kBounded only
  const float* a_log = nullptr;    // [HV] on the device; null means zeros
  const float* dt_bias = nullptr;  // [HV * K] on the device; null means zeros
  bool l2norm = true;
  bool beta_is_logit = false;
  float beta_scale = 1.0f;
  float scale = 1.0f;

  // May be the same pool with the same slots: the state is then updated in place. initial.data null: zeros.
  // final.data null: not written. Both have the same type.
  CudaStates initial, final;
  // A sequence whose slot (of initial; of final where initial.data is null) is below first_slot is padding:
  // its outputs are zeros, its states stay as they are. 1 keeps slot 0 as a null slot, as vLLM does.
  int first_slot = 0;

  // Speculative decoding (vLLM's scheme). token_slots [N][token_slot_stride] on the device replaces the slots
  // of `initial` and `final` (which must be one pool): sequence n starts from the state in
  // token_slots[n][accepted[n] - 1] and leaves its state after token t in token_slots[n][t]; a slot below
  // first_slot is not written. `accepted` [N]: how many tokens of the sequence's last call were accepted, at
  // least 1; null means 1. The convolution's state then holds 3 + (tokens of that call) - 1 inputs, and the
  // history starts at row accepted[n] - 1; rejecting tokens costs nothing. No sequence may have more than
  // token_slot_stride tokens.
  const int32_t* token_slots = nullptr;
  int64_t token_slot_stride = 0;
  const int32_t* accepted = nullptr;

  KdaDecodeConv conv;
  KdaDecodeNorm norm;

  void* out = nullptr;  // [T][HV][V]
  int64_t out_stride = 0;

  // CTAs that share a head, each with a part of its value rows: 1, 2, 4 or 8 (1 or 2 for V = 64); 0: chosen
  // by the number of heads. The same bits come out whatever it is, except that the norm sums in another
  // order.
  int split = 0;
};

// Throws Error when a dimension, a type, a pointer or a stride does not fit (what is on the device is not
// read).
void validate(const KdaDecodeCudaParams& params);

// Whether a sequence may have another number of tokens than one.
bool has_many_tokens(const KdaDecodeCudaParams& params);

// CTAs per head that `split = 0` stands for on a GPU with this many multiprocessors.
int kda_decode_split(const KdaDecodeCudaParams& params, int multiprocessors);

// Throws Error when the arguments do not fit or the launch fails. Accesses q, k, v, gate, beta and out
// element by element, so they need no alignment; states and convolution weights are aligned to 16 and 4
// bytes.
void kda_decode_cuda(const KdaDecodeCudaParams& params, CUstream_st* stream);

// Bytes that the call has to move: states in and out once, inputs, outputs, convolution states and weights.
double kda_decode_bytes(const KdaDecodeCudaParams& params);

}  // namespace kilin
