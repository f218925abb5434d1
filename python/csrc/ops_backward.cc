// SPDX-License-Identifier: Apache-2.0
// The gradients on the CPU (float32).
#include <cstring>
#include <vector>

#include "arguments.h"
#include "cpu.h"
#include "kernels/kda/kda_backward.h"

namespace kilin::torch_ops {
namespace {

Gradients kda_backward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                           const Tensor& beta, const OptionalTensor& a_log, const OptionalTensor& dt_bias,
                           const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                           double scale, int64_t gate_kind, double lower_bound, bool l2norm,
                           bool beta_is_logit, double beta_scale, const Tensor& d_out,
                           const OptionalTensor& d_state) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  KdaBackwardParams p;
  p.forward = cpu_params(in, shape);
  const std::vector<int32_t> bounds = sequence_bounds(in, shape);
  const std::vector<int32_t> slots = slots_in_order(shape.sequences);
  p.forward.cu_seqlens = bounds.data();
  p.forward.slots = slots.data();
  const int64_t states = shape.sequences * shape.state_size();
  if (initial_state) check_plain("initial_state", *initial_state, states, ScalarType::Float, q);
  p.forward.state = pointer<float>(initial_state);
  check_sizes("d_out", d_out, {shape.batch, shape.length, shape.value_heads, shape.value_dim});
  check_type("d_out", d_out, ScalarType::Float);
  p.d_out = pointer<float>(d_out);
  p.d_out_stride = token_stride("d_out", d_out);

  const InputGradients d(in, shape);
  const bool want_state = initial_state || d_state;
  const Tensor dstate =
      want_state
          ? zeros(q, {shape.sequences, shape.value_heads, shape.value_dim, shape.key_dim}, ScalarType::Float)
          : zeros(q, {0}, ScalarType::Float);
  if (d_state) {
    check_plain("d_state", *d_state, states, ScalarType::Float, q);
    std::memcpy(dstate.data_ptr(), d_state->data_ptr(), static_cast<size_t>(states) * sizeof(float));
  }
  p.d_state = want_state ? pointer<float>(dstate) : nullptr;
  p.d_slot_stride = shape.state_size();
  p.d_q = pointer<float>(d.q);
  p.d_k = pointer<float>(d.k);
  p.d_v = pointer<float>(d.v);
  p.d_gate = pointer<float>(d.gate);
  p.d_beta = pointer<float>(d.beta);
  p.d_q_stride = p.d_k_stride = shape.key_row();
  p.d_v_stride = shape.value_row();
  p.d_gate_stride = shape.gate_row();
  p.d_beta_stride = shape.value_heads;
  d.set_gate_gradients(p);
  if (shape.tokens() > 0) kda_backward(p, thread_pool());
  return d.with_state(initial_state ? dstate : empty(q, {0}, ScalarType::Float));
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CPU, m) {
  m.impl("kda_backward", TORCH_BOX(&kilin::torch_ops::kda_backward_cpu));
}
