// SPDX-License-Identifier: Apache-2.0
// What the operators of the PyTorch extension share: arguments as the dispatcher hands them over, their
// shapes, and checks. Written against torch's stable ABI, so that one binary serves every torch from 2.9 on.
//
// Shapes: q, k [B, T, H, K]; v [B, T, HV, V]; gate [B, T, HV, K]; beta [B, T, HV]; a_log [HV];
// dt_bias [HV * K]; states [N, HV, V, K]; cu_seqlens [N + 1], int32 or int64, only with B = 1 (else N = B).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "base/error.h"
#include "kernels/kda/kda.h"

namespace kilin::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that are not tensors, as in KdaParams. form: which form computes it on the CPU.
struct Options {
  double scale = 1.0;
  int64_t gate_kind = 0;
  double lower_bound = -5.0;
  bool l2norm = false;
  bool beta_is_logit = false;
  double beta_scale = 1.0;
};

struct Inputs {
  Tensor q, k, v, gate, beta;
  OptionalTensor a_log, dt_bias, cu_seqlens;
  Options options;
};

struct Shape {
  int64_t batch = 0;
  int64_t length = 0;  // T of the tensors; tokens() of them all
  int64_t heads = 0;
  int64_t value_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t sequences = 0;

  int64_t tokens() const { return batch * length; }
  int64_t key_row() const { return heads * key_dim; }
  int64_t value_row() const { return value_heads * value_dim; }
  int64_t gate_row() const { return value_heads * key_dim; }
  int64_t state_size() const { return value_heads * value_dim * key_dim; }
};

inline KdaGate gate_kind(const Options& options) {
  constexpr std::array kKinds = {KdaGate::kSoftplus, KdaGate::kBounded, KdaGate::kNone};
  check(options.gate_kind >= 0 && options.gate_kind < 3, "kda: gate_kind is {}, expected 0 to 2",
        options.gate_kind);
  return kKinds[static_cast<size_t>(options.gate_kind)];
}

inline void check_sizes(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  check(tensor.dim() == static_cast<int64_t>(expected.size()), "kda: {} has {} dimensions, expected {}", name,
        tensor.dim(), expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) {
    check(tensor.size(i) == size, "kda: {} has size {} in dimension {}, expected {}", name, tensor.size(i), i,
          size);
    ++i;
  }
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  check(tensor.scalar_type() == type, "kda: {} is {}, expected {}", name,
        torch::headeronly::toString(tensor.scalar_type()), torch::headeronly::toString(type));
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& q) {
  check(tensor.is_cuda() == q.is_cuda() && (!q.is_cuda() || tensor.get_device() == q.get_device()),
        "kda: {} is on another device than q", name);
}

// A small tensor that is read as it lies in memory.
inline void check_plain(const char* name, const Tensor& tensor, int64_t count, ScalarType type,
                        const Tensor& q) {
  check(tensor.numel() == count, "kda: {} has {} elements, expected {}", name, tensor.numel(), count);
  check_type(name, tensor, type);
  check(tensor.is_contiguous(), "kda: {} must be contiguous", name);
  check_same_device(name, tensor, q);
}

// What can be seen of cu_seqlens without reading it.
inline void check_bounds(const Tensor& cu_seqlens, const Tensor& q) {
  const ScalarType type = cu_seqlens.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, "kda: cu_seqlens must be int32 or int64");
  check(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, "kda: cu_seqlens must have N + 1 elements");
  check(cu_seqlens.is_contiguous(), "kda: cu_seqlens must be contiguous");
  check_same_device("cu_seqlens", cu_seqlens, q);
}

inline Shape shape_of(const Inputs& in) {
  check(in.q.dim() == 4, "kda: q has {} dimensions, expected [B, T, H, K]", in.q.dim());
  check(in.v.dim() == 4, "kda: v has {} dimensions, expected [B, T, HV, V]", in.v.dim());
  Shape s{.batch = in.q.size(0),
          .length = in.q.size(1),
          .heads = in.q.size(2),
          .value_heads = in.v.size(2),
          .key_dim = in.q.size(3),
          .value_dim = in.v.size(3),
          .sequences = in.q.size(0)};
  check_sizes("k", in.k, {s.batch, s.length, s.heads, s.key_dim});
  check_sizes("v", in.v, {s.batch, s.length, s.value_heads, s.value_dim});
  check_sizes("gate", in.gate, {s.batch, s.length, s.value_heads, s.key_dim});
  check_sizes("beta", in.beta, {s.batch, s.length, s.value_heads});
  check_same_device("k", in.k, in.q);
  check_same_device("v", in.v, in.q);
  check_same_device("gate", in.gate, in.q);
  check_same_device("beta", in.beta, in.q);
  if (in.a_log) check_plain("a_log", *in.a_log, s.value_heads, ScalarType::Float, in.q);
  if (in.dt_bias) check_plain("dt_bias", *in.dt_bias, s.value_heads * s.key_dim, ScalarType::Float, in.q);
  if (in.cu_seqlens) {
    check(s.batch == 1, "kda: the batch size is {}, expected 1 with cu_seqlens", s.batch);
    check_bounds(*in.cu_seqlens, in.q);
    s.sequences = in.cu_seqlens->numel() - 1;
  }
  check(s.tokens() <= INT32_MAX && s.sequences <= INT32_MAX, "kda: {} tokens are too many", s.tokens());
  return s;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  type);
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  type);
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// The part of a kernel's parameters that is the same on every device.
template <class Params>
void set_sizes_and_options(Params& p, const Inputs& in, const Shape& shape) {
  p.heads = static_cast<int>(shape.heads);
  p.value_heads = static_cast<int>(shape.value_heads);
  p.key_dim = static_cast<int>(shape.key_dim);
  p.value_dim = static_cast<int>(shape.value_dim);
  p.sequences = static_cast<int>(shape.sequences);
  p.gate_kind = gate_kind(in.options);
  p.lower_bound = static_cast<float>(in.options.lower_bound);
  p.a_log = pointer<float>(in.a_log);
  p.dt_bias = pointer<float>(in.dt_bias);
  p.l2norm = in.options.l2norm;
  p.beta_is_logit = in.options.beta_is_logit;
  p.scale = static_cast<float>(in.options.scale);
  p.out_stride = shape.value_row();
}

// Elements from one token to the next of a [B, T, ...] tensor whose rows are contiguous and evenly spaced.
inline int64_t token_stride(const char* name, const Tensor& tensor) {
  int64_t row = 1;
  for (int64_t i = tensor.dim() - 1; i >= 2; --i) {
    check(tensor.size(i) == 1 || tensor.stride(i) == row, "kda: within a token {} must be contiguous", name);
    row *= tensor.size(i);
  }
  const int64_t batch = tensor.size(0);
  const int64_t length = tensor.size(1);
  if (batch * length <= 1) return row;
  const int64_t stride = length == 1 ? tensor.stride(0) : tensor.stride(1);
  check(stride >= row && (batch == 1 || length == 1 || tensor.stride(0) == length * stride),
        "kda: the tokens of {} must be evenly spaced", name);
  return stride;
}

// Elements from one slot of a pool [slots, HV, V, K] to the next.
inline int64_t pool_stride(const Tensor& pool, const Shape& shape) {
  check(pool.dim() == 4, "kda: pool has {} dimensions, expected [slots, HV, V, K]", pool.dim());
  check_sizes("pool", pool, {pool.size(0), shape.value_heads, shape.value_dim, shape.key_dim});
  int64_t row = 1;
  for (int64_t i = 3; i >= 1; --i) {
    check(pool.size(i) == 1 || pool.stride(i) == row, "kda: within a slot the pool must be contiguous");
    row *= pool.size(i);
  }
  if (pool.size(0) <= 1) return row;
  check(pool.stride(0) >= row, "kda: the slots of the pool overlap");
  return pool.stride(0);
}

// Of q, k, v, gate, beta, a_log, dt_bias and initial_state; empty for an argument that is not there.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Room for all of them but that of the state. The first five are of their arguments' types, and whatever
// kernel runs fills them. a_log and dt_bias are zeros: neither is written without a gate, and nothing is
// without tokens.
struct InputGradients {
  InputGradients(const Inputs& in, const Shape& shape)
      : q(like(in.q)),
        k(like(in.k)),
        v(like(in.v)),
        gate(like(in.gate)),
        beta(like(in.beta)),
        a_log(zeros(in.q, {in.a_log ? shape.value_heads : 0}, ScalarType::Float)),
        dt_bias(zeros(in.q, {in.dt_bias ? shape.gate_row() : 0}, ScalarType::Float)) {}

  template <class Params>
  void set_gate_gradients(Params& p) const {
    const bool gated = p.forward.gate_kind != KdaGate::kNone;
    p.d_a_log = gated && a_log.numel() > 0 ? pointer<float>(a_log) : nullptr;
    p.d_dt_bias = gated && dt_bias.numel() > 0 ? pointer<float>(dt_bias) : nullptr;
  }
  Gradients with_state(const Tensor& state) const { return {q, k, v, gate, beta, a_log, dt_bias, state}; }

  Tensor q, k, v, gate, beta, a_log, dt_bias;

 private:
  static Tensor like(const Tensor& t) {
    if (t.dim() == 4) return empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
    return empty(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
  }
};

}  // namespace kilin::torch_ops
