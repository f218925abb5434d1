// SPDX-License-Identifier: Apache-2.0
// The operators on NVIDIA GPUs: kda_chunk_cuda and kda_decode_cuda on torch's current stream, with workspace
// from torch's caching allocator. Nothing here synchronises, so the operators may be captured in a CUDA
// graph.
#include <dlfcn.h>

#include <tuple>

#include "arguments.h"
#include "kernels/kda/kda_cuda.h"
#include "kernels/kda/kda_decode_cuda.h"

namespace kilin::torch_ops {
namespace {

// Functions of libtorch_cuda, looked up in the library that torch has already loaded: linked to, they would
// keep this library from loading beside a torch without CUDA, and from being built there.
void* torch_cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  check(library != nullptr, "kda: this torch has no CUDA");
  void* const function = dlsym(library, name);
  check(function != nullptr, "kda: this torch does not have {}", name);
  return function;
}

void check_torch(int32_t error, const char* name) { check(error == 0, "kda: {} failed", name); }

CUstream_st* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto get =
      reinterpret_cast<Function>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  check_torch(get(device, &stream), "aoti_torch_get_current_cuda_stream");
  return static_cast<CUstream_st*>(stream);
}

// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    static const auto create = reinterpret_cast<Create>(torch_cuda_function("aoti_torch_create_cuda_guard"));
    static const auto destroy =
        reinterpret_cast<Destroy>(torch_cuda_function("aoti_torch_delete_cuda_guard"));
    destroy_ = destroy;
    check_torch(create(device, &guard_), "aoti_torch_create_cuda_guard");
  }
  ~DeviceGuard() { destroy_(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  using Create = int32_t (*)(int32_t, void**);
  using Destroy = int32_t (*)(void*);
  void* guard_ = nullptr;
  Destroy destroy_ = nullptr;
};

CudaType cuda_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return CudaType::kF32;
    case ScalarType::Half:
      return CudaType::kF16;
    case ScalarType::BFloat16:
      return CudaType::kBf16;
    default:
      fail("kda: {} is {}, expected float32, float16 or bfloat16", name,
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What both kernels' parameters have in common.
template <class Params>
Params cuda_params(const Inputs& in, const Shape& shape, const Tensor& out) {
  check_type("k", in.k, in.q.scalar_type());
  check_type("v", in.v, in.q.scalar_type());
  check(in.q.scalar_type() != ScalarType::Float,
        "kda: q is float32, but the CUDA kernels take bfloat16 and float16");
  Params p;
  p.heads = static_cast<int>(shape.heads);
  p.value_heads = static_cast<int>(shape.value_heads);
  p.key_dim = static_cast<int>(shape.key_dim);
  p.value_dim = static_cast<int>(shape.value_dim);
  p.sequences = static_cast<int>(shape.sequences);
  p.tokens = shape.tokens();
  p.cu_seqlens = pointer<void>(in.cu_seqlens);
  p.wide_seqlens = in.cu_seqlens && in.cu_seqlens->scalar_type() == ScalarType::Long;
  p.type = cuda_type("q", in.q);
  p.q = {in.q.data_ptr(), token_stride("q", in.q)};
  p.k = {in.k.data_ptr(), token_stride("k", in.k)};
  p.v = {in.v.data_ptr(), token_stride("v", in.v)};
  p.gate = {in.gate.data_ptr(), token_stride("gate", in.gate)};
  p.gate_type = cuda_type("gate", in.gate);
  p.beta = {in.beta.data_ptr(), token_stride("beta", in.beta)};
  p.beta_type = cuda_type("beta", in.beta);
  p.gate_kind = gate_kind(in.options);
  p.lower_bound = static_cast<float>(in.options.lower_bound);
  p.a_log = pointer<float>(in.a_log);
  p.dt_bias = pointer<float>(in.dt_bias);
  p.l2norm = in.options.l2norm;
  p.beta_is_logit = in.options.beta_is_logit;
  p.beta_scale = static_cast<float>(in.options.beta_scale);
  p.scale = static_cast<float>(in.options.scale);
  p.out = out.data_ptr();
  p.out_stride = shape.value_row();
  return p;
}

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

void run_recurrent(const Inputs& in, const Shape& shape, const Tensor& out, const CudaStates& initial,
                   const CudaStates& final) {
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
  } else if (form == kRecurrentForm && shape.key_dim == shape.value_dim && chunk_states == 0) {
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
