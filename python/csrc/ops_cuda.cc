// SPDX-License-Identifier: Apache-2.0
// The operators on NVIDIA GPUs: kda_chunk_cuda and kda_decode_cuda on torch's current stream, with workspace
// from torch's caching allocator. Nothing here synchronises, so the operators may be captured in a CUDA
// graph.
#include <tuple>

#include "cuda.h"
#include "kernels/kda/kda_cuda.h"
#include "kernels/kda/kda_decode_cuda.h"
#include "kernels/kda/kda_recurrent_cuda.h"

namespace kilin::torch_ops {
namespace {

constexpr int64_t kChunkForm = 1;
constexpr int64_t kRecurrentForm = 2;

void run_chunked(const Inputs& in, const Shape& shape, const Tensor& out, const CudaStates& initial,
                 const CudaStates& final, const Tensor& chunk_states) {
  auto params = cuda_params<KdaCudaParams>(in, shape, out);
  params.initial = initial;
  params.final = final;
  if (chunk_states.numel() > 0) {
    params.chunk_states = chunk_states.data_ptr();
    params.chunk_state_type = params.type;
  }
  const auto bytes = static_cast<int64_t>(kda_chunk_cuda_workspace(params));
  const Tensor workspace = empty(in.q, {bytes}, ScalarType::Byte);
  kda_chunk_cuda(params, workspace.data_ptr(), static_cast<size_t>(bytes), current_stream(in.q.get_device()));
}

// Token by token: the decode step where it has the shape, else the plain recurrence.
void run_recurrent(const Inputs& in, const Shape& shape, const Tensor& out, const CudaStates& initial,
                   const CudaStates& final) {
  const bool has_step = shape.key_dim == shape.value_dim && (shape.key_dim == 64 || shape.key_dim == 128);
  if (!has_step || in.q.scalar_type() == ScalarType::Float) {
    auto params = cuda_params<KdaCudaParams>(in, shape, out, true);
    params.initial = initial;
    params.final = final;
    return kda_recurrent_cuda(params, current_stream(in.q.get_device()));
  }
  auto params = cuda_params<KdaDecodeCudaParams>(in, shape, out);
  params.initial = initial;
  params.final = final;
  kda_decode_cuda(params, current_stream(in.q.get_device()));
}

std::tuple<Tensor, Tensor, Tensor> kda_gpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& beta,
    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, double scale, int64_t gate_kind, double lower_bound, bool l2norm,
    bool beta_is_logit, double beta_scale, int64_t form, bool want_state, int64_t chunk_states) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  const DeviceGuard guard(q.get_device());
  Tensor out = empty(q, {shape.batch, shape.length, shape.value_heads, shape.value_dim}, q.scalar_type());
  const std::initializer_list<int64_t> sizes = {shape.sequences, shape.value_heads, shape.value_dim,
                                                shape.key_dim};
  CudaStates initial;
  if (initial_state) {
    check_sizes("initial_state", *initial_state, sizes);
    check_plain("initial_state", *initial_state, shape.sequences * shape.state_size(), ScalarType::Float, q);
    initial = {.data = initial_state->data_ptr(), .slot_stride = shape.state_size()};
  }
  Tensor state = want_state ? empty(q, sizes, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  CudaStates final;
  if (want_state) final = {.data = state.data_ptr(), .slot_stride = shape.state_size()};
  const Tensor kept =
      empty(q, {chunk_states, shape.value_heads, shape.value_dim, shape.key_dim}, q.scalar_type());
  if (shape.tokens() == 0) {
    if (want_state && initial_state) torch::stable::copy_(state, *initial_state);
    if (want_state && !initial_state) torch::stable::zero_(state);
  } else if (form == kRecurrentForm && chunk_states == 0) {
    run_recurrent(in, shape, out, initial, final);
  } else {
    run_chunked(in, shape, out, initial, final, kept);
  }
  return {out, state, kept};
}

// The pool in place, token by token (kda_decode_cuda). slots [N], or [N, S] with a slot per token for
// speculation.
Tensor kda_pool_gpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const Tensor& beta,
                    const OptionalTensor& a_log, const OptionalTensor& dt_bias, const Tensor& pool,
                    const Tensor& slots, const OptionalTensor& accepted, const OptionalTensor& cu_seqlens,
                    double scale, int64_t gate_kind, double lower_bound, bool l2norm, bool beta_is_logit,
                    double beta_scale, int64_t form, int64_t first_slot) {
  const Inputs in{q,       k,          v,
                  gate,    beta,       a_log,
                  dt_bias, cu_seqlens, {scale, gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale}};
  const Shape shape = shape_of(in);
  check(form != kChunkForm, "kda: the chunked form on a pool is not there on CUDA");
  const DeviceGuard guard(q.get_device());
  Tensor out = empty(q, {shape.batch, shape.length, shape.value_heads, shape.value_dim}, q.scalar_type());
  auto params = cuda_params<KdaDecodeCudaParams>(in, shape, out);
  check_same_device("pool", pool, q);
  params.initial = {
      .data = pool.data_ptr(), .type = cuda_type("pool", pool), .slot_stride = pool_stride(pool, shape)};
  check_type("slots", slots, ScalarType::Int);
  check_same_device("slots", slots, q);
  check(slots.is_contiguous() && slots.dim() <= 2 && slots.size(0) == shape.sequences,
        "kda: slots must be contiguous and have a row for each of {} sequences", shape.sequences);
  if (slots.dim() == 2) {
    params.token_slots = pointer<int32_t>(slots);
    params.token_slot_stride = slots.size(1);
    if (accepted) check_plain("accepted", *accepted, shape.sequences, ScalarType::Int, q);
    params.accepted = pointer<int32_t>(accepted);
  } else {
    check(!accepted, "kda: accepted needs a slot per token");
    params.initial.slots = pointer<int32_t>(slots);
  }
  params.final = params.initial;
  params.first_slot = static_cast<int>(first_slot);
  if (shape.tokens() > 0) kda_decode_cuda(params, current_stream(q.get_device()));
  return out;
}

}  // namespace
}  // namespace kilin::torch_ops

STABLE_TORCH_LIBRARY_IMPL(kilin, CUDA, m) {
  m.impl("kda", TORCH_BOX(&kilin::torch_ops::kda_gpu));
  m.impl("kda_pool", TORCH_BOX(&kilin::torch_ops::kda_pool_gpu));
}
