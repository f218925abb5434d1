// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_backward_cuda.h"

#include "base/error.h"

namespace kilin {
namespace {

void check_gradient(const CudaGradient& gradient, const char* name, int64_t width, int64_t alignment) {
  if (gradient.data == nullptr) return;
  check(gradient.stride >= width, "KDA gradients on the GPU: stride of {} is {}, expected at least {}", name,
        gradient.stride, width);
  check(gradient.stride % alignment == 0 && reinterpret_cast<uintptr_t>(gradient.data) % (2 * alignment) == 0,
        "KDA gradients on the GPU: {} must be aligned to {} elements at every token", name, alignment);
}

}  // namespace

void validate(const KdaBackwardCudaParams& params) {
  KdaCudaParams p = params.forward;
  const int64_t key_row = static_cast<int64_t>(p.heads) * p.key_dim;
  const int64_t value_row = static_cast<int64_t>(p.value_heads) * p.value_dim;
  p.out = const_cast<void*>(params.d_out.data);  // checked like an output of the forward pass
  p.out_stride = params.d_out.stride;
  p.final = CudaStates{};
  p.chunk_states = nullptr;
  validate(p);
  check(p.key_dim == p.value_dim,
        "KDA gradients on the GPU: key dimension {} and value dimension {} must be the same", p.key_dim,
        p.value_dim);
  validate_states(params.d_final, "d_final", p);
  validate_states(params.d_initial, "d_initial", p);
  check_gradient(params.d_q, "d_q", key_row, 1);
  check_gradient(params.d_k, "d_k", key_row, 1);
  check_gradient(params.d_v, "d_v", value_row, 2);
  check_gradient(params.d_gate, "d_gate", static_cast<int64_t>(p.value_heads) * p.key_dim, 1);
  check_gradient(params.d_beta, "d_beta", p.value_heads, 1);
  if (p.gate_kind == KdaGate::kNone) {
    check(params.d_a_log == nullptr && params.d_dt_bias == nullptr,
          "KDA gradients on the GPU: d_a_log or d_dt_bias is given, but there is no gate");
  }
}

}  // namespace kilin
