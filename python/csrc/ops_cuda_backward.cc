// SPDX-License-Identifier: Apache-2.0
// The gradients on NVIDIA GPUs: kda_backward_cuda on torch's current stream, with workspace from torch's
// caching allocator. Nothing here synchronises.
#include <tuple>

#include "cuda.h"
#include "kernels/kda/kda_backward_cuda.h"

namespace kilin::torch_ops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor like(const Tensor& t) {
  if (t.dim() == 4) return empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  return empty(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
}

// Of q, k, v, gate, beta, a_log, dt_bias and initial_state, each in the type of its tensor; empty for an
// argument that is not there. K = V of 64 or 128 (_ops.py pads others).
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

  const Tensor dq = like(q);
  const Tensor dk = like(k);
  const Tensor dv = like(v);
  const Tensor dgate = like(gate);
  const Tensor dbeta = like(beta);
  // Zeros: without tokens nothing is written, and without a gate neither of these is.
  const Tensor da_log = zeros(q, {a_log ? shape.value_heads : 0}, ScalarType::Float);
  const Tensor ddt_bias = zeros(q, {dt_bias ? shape.gate_row() : 0}, ScalarType::Float);
  Tensor dstate =
      initial_state
          ? empty(q, {shape.sequences, shape.value_heads, shape.value_dim, shape.key_dim}, ScalarType::Float)
          : empty(q, {0}, ScalarType::Float);
  if (shape.tokens() == 0) {
    if (initial_state && d_state) torch::stable::copy_(dstate, *d_state);
    if (initial_state && !d_state) torch::stable::zero_(dstate);
    return {dq, dk, dv, dgate, dbeta, da_log, ddt_bias, dstate};
  }

  KdaBackwardCudaParams p;
  p.forward = cuda_params<KdaCudaParams>(in, shape, d_out);
  if (initial_state)
    p.forward.initial = {.data = initial_state->data_ptr(), .slot_stride = shape.state_size()};
  p.d_out = {d_out.data_ptr(), token_stride("d_out", d_out)};
  if (d_state) p.d_final = {.data = d_state->data_ptr(), .slot_stride = shape.state_size()};
  if (initial_state) p.d_initial = {.data = dstate.data_ptr(), .slot_stride = shape.state_size()};
  p.d_q = {dq.data_ptr(), shape.key_row()};
  p.d_k = {dk.data_ptr(), shape.key_row()};
  p.d_v = {dv.data_ptr(), shape.value_row()};
  p.d_gate = {dgate.data_ptr(), shape.gate_row()};
  p.d_beta = {dbeta.data_ptr(), shape.value_heads};
  const bool gated = p.forward.gate_kind != KdaGate::kNone;
  p.d_a_log = gated && a_log ? pointer<float>(da_log) : nullptr;
  p.d_dt_bias = gated && dt_bias ? pointer<float>(ddt_bias) : nullptr;
  const auto bytes = static_cast<int64_t>(kda_backward_cuda_workspace(p));
  const Tensor workspace = empty(q, {bytes}, ScalarType::Byte);
  kda_backward_cuda(p, workspace.data_ptr(), static_cast<size_t>(bytes), current_stream(q.get_device()));
  return {dq, dk, dv, dgate, dbeta, da_log, ddt_bias, dstate};
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CUDA, m) {
  m.impl("kda_backward", TORCH_BOX(&kilin::torch_ops::kda_backward_gpu));
}
