// SPDX-License-Identifier: Apache-2.0
// The fused decode step of a KDA layer (kda_decode_cuda) on torch's current stream. Nothing here allocates or
// synchronises, so it may be captured in a CUDA graph.
#include "cuda.h"
#include "kernels/kda/kda_decode_cuda.h"

namespace kilin::torch_ops {
namespace {

struct DecodeShape {
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t value_heads = 0;
  int64_t dim = 0;  // K = V
  int64_t channels() const { return (2 * heads + value_heads) * dim; }
};

// qkv [N, (2 H + HV) K]; pool [slots, HV, V, K] says HV and K.
DecodeShape decode_shape(const Tensor& qkv, const Tensor& pool) {
  check(qkv.dim() == 2, "kda_decode: qkv has {} dimensions, expected [N, channels]", qkv.dim());
  check(pool.dim() == 4, "kda_decode: pool has {} dimensions, expected [slots, HV, V, K]", pool.dim());
  DecodeShape s{.tokens = qkv.size(0), .value_heads = pool.size(1), .dim = pool.size(3)};
  check(pool.size(2) == s.dim && (s.dim == 64 || s.dim == 128),
        "kda_decode: V x K is {} x {}, expected 64 x 64 or 128 x 128", pool.size(2), s.dim);
  const int64_t keys = qkv.size(1) - s.value_heads * s.dim;
  check(keys > 0 && keys % (2 * s.dim) == 0,
        "kda_decode: qkv has {} channels, expected 2 H {} + {} for q, k and the {} heads of v", qkv.size(1),
        s.dim, s.value_heads * s.dim, s.value_heads);
  s.heads = keys / (2 * s.dim);
  return s;
}

// Weights [channels, 4], or [3, 4, channels / 3] float32 (q, k and v of as many channels).
void set_conv(KdaDecodeCudaParams& p, const DecodeShape& s, const Tensor& weight, const Tensor& state) {
  check(weight.is_contiguous(), "kda_decode: conv_weight must be contiguous");
  KdaDecodeConv& conv = p.conv;
  conv.weight_type = cuda_type("conv_weight", weight);
  const auto bytes = static_cast<int64_t>(cuda_size(conv.weight_type));
  const int64_t per_part =
      kKdaDecodeTaps * s.heads * s.dim;  // elements from q's weights to k's, and from k's to v's
  if (weight.dim() == 3) {
    check(s.heads == s.value_heads,
          "kda_decode: conv_weight [3, 4, channels] needs as many heads of v as of q");
    check_sizes("conv_weight", weight, {3, kKdaDecodeTaps, s.heads * s.dim});
    conv.tap_stride = s.heads * s.dim;
  } else {
    check_sizes("conv_weight", weight, {s.channels(), kKdaDecodeTaps});
  }
  const char* data = pointer<const char>(weight);
  conv.q_weight = data;
  conv.k_weight = data + per_part * bytes;
  conv.v_weight = data + 2 * per_part * bytes;
  check(state.dim() == 3 && state.size(2) == s.channels() && state.stride(2) == 1 &&
            (state.size(1) == 1 || state.stride(1) == s.channels()),
        "kda_decode: conv_state must be [slots, {} or more, {}], contiguous within a slot",
        kKdaDecodeTaps - 1, s.channels());
  check(cuda_type("conv_state", state) == p.type, "kda_decode: conv_state must have the type of qkv");
  conv.state = state.data_ptr();
  conv.rows = static_cast<int>(state.size(1));
  conv.slot_stride = state.size(0) > 1 ? state.stride(0) : state.size(1) * s.channels();
  conv.slots = p.initial.slots;
}

void set_norm(KdaDecodeCudaParams& p, const DecodeShape& s, const OptionalTensor& z,
              const OptionalTensor& weight, double eps, int64_t activation) {
  constexpr GateActivation kActivations[] = {GateActivation::kNone, GateActivation::kSigmoid,
                                             GateActivation::kSilu};
  check(activation >= 0 && activation < 3, "kda_decode: activation is {}, expected 0 to 2", activation);
  check(weight || !z, "kda_decode: z without a weight of the norm");
  if (!weight) return;
  check_sizes("norm_weight", *weight, {s.dim});
  check(weight->is_contiguous(), "kda_decode: norm_weight must be contiguous");
  p.norm.weight = weight->data_ptr();
  p.norm.weight_type = cuda_type("norm_weight", *weight);
  p.norm.eps = static_cast<float>(eps);
  p.norm.activation = kActivations[activation];
  check(static_cast<bool>(z) == (p.norm.activation != GateActivation::kNone),
        "kda_decode: z and an activation belong together");
  if (!z) return;
  check_sizes("z", *z, {s.tokens, s.value_heads, s.dim});
  check(cuda_type("z", *z) == p.type, "kda_decode: z must have the type of qkv");
  p.norm.gate = {z->data_ptr(), row_stride("z", *z)};
}

void kda_decode_gpu(const Tensor& qkv, const Tensor& gate, const Tensor& beta, const OptionalTensor& a_log,
                    const OptionalTensor& dt_bias, const Tensor& pool, const Tensor& conv_state,
                    const Tensor& conv_weight, const Tensor& slots, const OptionalTensor& z,
                    const OptionalTensor& norm_weight, const Tensor& out, double scale,
                    int64_t gate_kind_index, double lower_bound, bool l2norm, bool beta_is_logit,
                    double beta_scale, int64_t first_slot, double eps, int64_t activation) {
  const DecodeShape s = decode_shape(qkv, pool);
  for (const Tensor* tensor : {&gate, &beta, &pool, &conv_state, &conv_weight, &slots, &out}) {
    check_same_device("an argument of kda_decode", *tensor, qkv);
  }
  check_sizes("gate", gate, {s.tokens, s.value_heads, s.dim});
  check_sizes("beta", beta, {s.tokens, s.value_heads});
  check_sizes("out", out, {s.tokens, s.value_heads, s.dim});
  check_plain("slots", slots, s.tokens, ScalarType::Int, qkv);
  if (a_log) check_plain("a_log", *a_log, s.value_heads, ScalarType::Float, qkv);
  if (dt_bias) check_plain("dt_bias", *dt_bias, s.value_heads * s.dim, ScalarType::Float, qkv);
  KdaDecodeCudaParams p;
  p.heads = static_cast<int>(s.heads);
  p.value_heads = static_cast<int>(s.value_heads);
  p.key_dim = p.value_dim = static_cast<int>(s.dim);
  p.sequences = static_cast<int>(s.tokens);
  p.tokens = s.tokens;
  p.type = cuda_type("qkv", qkv);
  const int64_t stride = row_stride("qkv", qkv);
  const char* data = pointer<const char>(qkv);
  const int64_t part = s.heads * s.dim * static_cast<int64_t>(cuda_size(p.type));
  p.q = {data, stride};
  p.k = {data + part, stride};
  p.v = {data + 2 * part, stride};
  p.gate = {gate.data_ptr(), row_stride("gate", gate)};
  p.gate_type = cuda_type("gate", gate);
  p.beta = {beta.data_ptr(), row_stride("beta", beta)};
  p.beta_type = cuda_type("beta", beta);
  p.gate_kind = gate_kind({.gate_kind = gate_kind_index});
  p.lower_bound = static_cast<float>(lower_bound);
  p.a_log = pointer<float>(a_log);
  p.dt_bias = pointer<float>(dt_bias);
  p.l2norm = l2norm;
  p.beta_is_logit = beta_is_logit;
  p.beta_scale = static_cast<float>(beta_scale);
  p.scale = static_cast<float>(scale);
  p.initial = {
      .data = pool.data_ptr(),
      .type = cuda_type("pool", pool),
      .slot_stride = pool_stride(pool, {.value_heads = s.value_heads, .key_dim = s.dim, .value_dim = s.dim}),
      .slots = pointer<int32_t>(slots)};
  p.final = p.initial;
  p.first_slot = static_cast<int>(first_slot);
  set_conv(p, s, conv_weight, conv_state);
  set_norm(p, s, z, norm_weight, eps, activation);
  check(cuda_type("out", out) == p.type, "kda_decode: out must have the type of qkv");
  p.out = out.data_ptr();
  p.out_stride = row_stride("out", out);
  const DeviceGuard guard(qkv.get_device());
  if (s.tokens > 0) kda_decode_cuda(p, current_stream(qkv.get_device()));
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CUDA, m) {
  m.impl("kda_decode", TORCH_BOX(&kilin::torch_ops::kda_decode_gpu));
}
