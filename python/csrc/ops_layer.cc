// SPDX-License-Identifier: Apache-2.0
// The short convolution and the gated RMSNorm around KDA, on the CPU (float32). Their gradients there are
// plain torch operations (python/kilin/layer.py).
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "kernels/conv/short_conv.h"
#include "kernels/norm/norm.h"
#include "layer.h"

namespace kilin::torch_ops {
namespace {

std::tuple<Tensor, Tensor> short_conv_cpu(const Tensor& u, const Tensor& weight,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& cu_seqlens, bool silu, bool want_state) {
  const ConvShape shape = conv_shape(u, weight, initial_state, cu_seqlens);
  check_type("u", u, ScalarType::Float);
  check_type("weight", weight, ScalarType::Float);
  check(silu, "short_conv: the CPU kernel always applies SiLU");
  const std::vector<int32_t> bounds =
      sequence_bounds(cu_seqlens, shape.sequences, shape.length, shape.tokens());
  const std::vector<int32_t> slots = slots_in_order(shape.sequences);
  Tensor state = zeros(u, {shape.sequences, shape.taps - 1, shape.channels}, ScalarType::Float);
  if (initial_state) torch::stable::copy_(state, *initial_state);
  const Tensor y = empty(u, {shape.batch, shape.length, shape.channels}, ScalarType::Float);
  std::vector<float> w(static_cast<size_t>(shape.taps * shape.channels));  // [taps][channels]
  const float* rows = pointer<float>(weight);
  for (int64_t c = 0; c < shape.channels; ++c) {
    for (int64_t i = 0; i < shape.taps; ++i) w[i * shape.channels + c] = rows[c * shape.taps + i];
  }
  ShortConvParams p;
  p.channels = shape.channels;
  p.taps = shape.taps;
  p.sequences = static_cast<int>(shape.sequences);
  p.cu_seqlens = bounds.data();
  p.slots = slots.data();
  p.u = pointer<float>(u);
  p.u_stride = token_stride("u", u);
  p.w = w.data();
  p.state = pointer<float>(state);
  p.slot_stride = (shape.taps - 1) * shape.channels;
  p.y = pointer<float>(y);
  p.y_stride = shape.channels;
  if (shape.tokens() > 0) short_conv(p, thread_pool());
  return {y, want_state ? state : empty(u, {0}, ScalarType::Float)};
}

Tensor gated_rms_norm_cpu(const Tensor& x, const OptionalTensor& z, const OptionalTensor& weight, double eps,
                          int64_t activation) {
  const NormShape shape = norm_shape(x, z, weight, activation);
  check_type("x", x, ScalarType::Float);
  check(x.is_contiguous() && (!z || z->is_contiguous()), "gated_rms_norm: x and z must be contiguous");
  check(!z || z->scalar_type() == ScalarType::Float, "gated_rms_norm: z must be float32 like x");
  const std::vector<float> ones(weight ? 0 : static_cast<size_t>(shape.width), 1.0f);
  Tensor y = empty(x, {shape.tokens, shape.heads, shape.width}, ScalarType::Float);
  if (shape.tokens > 0) {
    gated_rms_norm(shape.tokens, shape.heads, shape.width, pointer<float>(x),
                   weight ? pointer<float>(*weight) : ones.data(), static_cast<float>(eps), pointer<float>(z),
                   shape.activation, pointer<float>(y), thread_pool());
  }
  return y;
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_FRAGMENT(kilin, m) {
  m.def(
      "short_conv(Tensor u, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, bool silu, "
      "bool want_state) -> (Tensor, Tensor)");
  m.def(
      "short_conv_backward(Tensor u, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, bool silu, "
      "Tensor d_y, Tensor? d_state) -> (Tensor, Tensor, Tensor)");
  m.def("short_conv_update(Tensor u, Tensor weight, Tensor(a!) pool, Tensor slots, bool silu) -> Tensor");
  m.def("gated_rms_norm(Tensor x, Tensor? z, Tensor? weight, float eps, int activation) -> Tensor");
  m.def(
      "gated_rms_norm_backward(Tensor x, Tensor? z, Tensor? weight, float eps, int activation, Tensor d_y) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "kda_decode(Tensor qkv, Tensor gate, Tensor beta, Tensor? a_log, Tensor? dt_bias, Tensor(a!) pool, "
      "Tensor(b!) conv_state, Tensor conv_weight, Tensor slots, Tensor? z, Tensor? norm_weight, Tensor(c!) "
      "out, "
      "float scale, int gate_kind, float lower_bound, bool l2norm, bool beta_is_logit, float beta_scale, "
      "int first_slot, float eps, int activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kilin, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&kilin::torch_ops::short_conv_cpu));
  m.impl("gated_rms_norm", TORCH_BOX(&kilin::torch_ops::gated_rms_norm_cpu));
}
