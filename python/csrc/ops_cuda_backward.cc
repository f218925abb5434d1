// SPDX-License-Identifier: Apache-2.0
// The gradients on NVIDIA GPUs: kda_backward_cuda on torch's current stream, with workspace from torch's
// caching allocator. Nothing here synchronises.
#include "cuda.h"
#include "kernels/kda/kda_backward_cuda.h"

namespace kilin::torch_ops {
namespace {

// K = V of 64 or 128 (_ops.py pads others).
Gradients kda_backward_gpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                           const Tensor& beta, const OptionalTensor& a_log, const OptionalTensor& dt_bias,
                           const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                           double scale, int64_t gate_kind, double lower_bound, bool l2norm,
                           bool beta_is_logit, double beta_scale, const Tensor& d_out,
                           const OptionalTensor& d_state) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  const DeviceGuard guard(q.get_device());
  const int64_t states = shape.sequences * shape.state_size();
  check_sizes("d_out", d_out, {shape.batch, shape.length, shape.value_heads, shape.value_dim});
  check_type("d_out", d_out, q.scalar_type());
  check_same_device("d_out", d_out, q);
  if (initial_state) check_plain("initial_state", *initial_state, states, ScalarType::Float, q);
  if (d_state) check_plain("d_state", *d_state, states, ScalarType::Float, q);

  const InputGradients d(in, shape);
  Tensor dstate =
      initial_state
          ? empty(q, {shape.sequences, shape.value_heads, shape.value_dim, shape.key_dim}, ScalarType::Float)
          : empty(q, {0}, ScalarType::Float);
  if (shape.tokens() == 0) {
    if (initial_state && d_state) torch::stable::copy_(dstate, *d_state);
    if (initial_state && !d_state) torch::stable::zero_(dstate);
    return d.with_state(dstate);
  }

  KdaBackwardCudaParams p;
  p.forward = cuda_params<KdaCudaParams>(in, shape, d_out);
  if (initial_state)
    p.forward.initial = {.data = initial_state->data_ptr(), .slot_stride = shape.state_size()};
  p.d_out = {d_out.data_ptr(), token_stride("d_out", d_out)};
  if (d_state) p.d_final = {.data = d_state->data_ptr(), .slot_stride = shape.state_size()};
  if (initial_state) p.d_initial = {.data = dstate.data_ptr(), .slot_stride = shape.state_size()};
  p.d_q = {d.q.data_ptr(), shape.key_row()};
  p.d_k = {d.k.data_ptr(), shape.key_row()};
  p.d_v = {d.v.data_ptr(), shape.value_row()};
  p.d_gate = {d.gate.data_ptr(), shape.gate_row()};
  p.d_beta = {d.beta.data_ptr(), shape.value_heads};
  d.set_gate_gradients(p);
  const auto bytes = static_cast<int64_t>(kda_backward_cuda_workspace(p));
  const Tensor workspace = empty(q, {bytes}, ScalarType::Byte);
  kda_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(bytes), current_stream(q.get_device()));
  return d.with_state(dstate);
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CUDA, m) {
  m.impl("kda_backward", TORCH_BOX(&kilin::torch_ops::kda_backward_gpu));
}
