// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_cuda.h"

#include <cmath>
#include <initializer_list>

#include "base/error.h"

namespace kilin {
namespace {

void check_tokens(const CudaTokens& tokens, const char* name, int64_t width, CudaType type,
                  int64_t alignment) {
  check(tokens.data != nullptr, "KDA on the GPU: {} is null", name);
  check(tokens.stride >= width, "KDA on the GPU: stride of {} is {}, expected at least {}", name,
        tokens.stride, width);
  const int64_t bytes = type == CudaType::kF32 ? 4 : 2;
  check(tokens.stride * bytes % alignment == 0 &&
            reinterpret_cast<uintptr_t>(tokens.data) % static_cast<size_t>(alignment) == 0,
        "KDA on the GPU: {} must be aligned to {} bytes at every token", name, alignment);
}

// What does not depend on the kernel.
void validate_common(const KdaCudaParams& p) {
  check(p.heads > 0 && p.value_heads > 0 && p.value_heads % p.heads == 0,
        "KDA on the GPU: {} value heads, expected a positive multiple of {} heads", p.value_heads, p.heads);
  check(p.sequences >= 0, "KDA on the GPU: {} sequences", p.sequences);
  check(p.tokens >= 0 && p.tokens < (int64_t{1} << 40), "KDA on the GPU: {} tokens", p.tokens);
  if (p.cu_seqlens == nullptr && p.sequences > 0) {
    check(p.tokens % p.sequences == 0,
          "KDA on the GPU: {} tokens do not make {} sequences of one length; give cu_seqlens", p.tokens,
          p.sequences);
  }
  check(p.sequences > 0 || p.tokens == 0, "KDA on the GPU: {} tokens in no sequence", p.tokens);
  if (p.gate_kind == KdaGate::kBounded)
    check(std::isfinite(p.lower_bound) && p.lower_bound < 0.0f,
          "KDA on the GPU: lower bound {}, expected a negative number", p.lower_bound);
  check(std::isfinite(p.scale) && std::isfinite(p.beta_scale),
        "KDA on the GPU: scale {} and beta scale {} must be finite", p.scale, p.beta_scale);
  validate_states(p.initial, "initial", p);
  validate_states(p.final, "final", p);
}

// alignment: of the rows of q, k, v, out and a gate of their type.
void check_all_tokens(const KdaCudaParams& p, int64_t alignment) {
  if (p.tokens == 0) return;
  check_tokens(p.q, "q", int64_t{p.heads} * p.key_dim, p.type, alignment);
  check_tokens(p.k, "k", int64_t{p.heads} * p.key_dim, p.type, alignment);
  check_tokens(p.v, "v", int64_t{p.value_heads} * p.value_dim, p.type, alignment);
  check_tokens(p.gate, "gate", int64_t{p.value_heads} * p.key_dim, p.gate_type,
               p.gate_type == p.type ? alignment : cuda_size(p.gate_type));
  check_tokens(p.beta, "beta", p.value_heads, p.beta_type, cuda_size(p.beta_type));
  check_tokens({p.out, p.out_stride}, "out", int64_t{p.value_heads} * p.value_dim, p.type, alignment);
}

}  // namespace

void validate_states(const CudaStates& states, const char* name, const KdaCudaParams& p) {
  if (states.data == nullptr) return;
  check(states.type == CudaType::kF32 || states.type == CudaType::kBf16,
        "KDA on the GPU: the {} state must be float32 or bfloat16", name);
  const int64_t size = static_cast<int64_t>(p.value_heads) * p.value_dim * p.key_dim;
  check(states.slot_stride >= size && (states.slot_stride % 2 == 0 || p.key_dim % 2 != 0),
        "KDA on the GPU: slot stride of the {} state is {}, expected an even number of at least {}", name,
        states.slot_stride, size);
  check(reinterpret_cast<uintptr_t>(states.data) % 8 == 0,
        "KDA on the GPU: the {} state must be aligned to 8 bytes", name);
}

void validate(const KdaCudaParams& p) {
  check(p.key_dim == 64 || p.key_dim == 128, "KDA on the GPU: key dimension {}, expected 64 or 128",
        p.key_dim);
  check(p.value_dim == 64 || p.value_dim == 128, "KDA on the GPU: value dimension {}, expected 64 or 128",
        p.value_dim);
  check(p.type == CudaType::kBf16 || p.type == CudaType::kF16,
        "KDA on the GPU: q, k and v must be bfloat16 or float16");
  check(p.gate_type == p.type || p.gate_type == CudaType::kF32,
        "KDA on the GPU: the gate must be float32 or of the type of q");
  validate_common(p);
  check(p.multiprocessors >= 0, "KDA on the GPU: {} multiprocessors", p.multiprocessors);
  check_all_tokens(p, 16);
  // The kernels multiply them in 32 bits.
  check(p.tokens < (int64_t{1} << 31), "KDA on the GPU: {} tokens, expected fewer than 2^31", p.tokens);
  for (const CudaTokens& x : {p.q, p.k, p.v, p.gate})
    check(x.stride < (int64_t{1} << 31), "KDA on the GPU: stride {}, expected less than 2^31", x.stride);
}

void validate_recurrent(const KdaCudaParams& p) {
  check(p.key_dim >= 1 && p.key_dim <= 256 && p.value_dim >= 1 && p.value_dim <= 256,
        "KDA on the GPU, token by token: key and value dimension {} and {}, expected 1 to 256", p.key_dim,
        p.value_dim);
  check(p.chunk_states == nullptr, "KDA on the GPU, token by token: there are no chunk states");
  validate_common(p);
  check_all_tokens(p, cuda_size(p.type));
}

}  // namespace kilin
