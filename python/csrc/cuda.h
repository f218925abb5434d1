// SPDX-License-Identifier: Apache-2.0
// What the CUDA operators share: torch's current stream and device, and the kernels' arguments.
#pragma once
#include <dlfcn.h>

#include "arguments.h"
#include "kernels/cuda/types.h"
#include "kernels/kda/kda.h"

namespace kilin::torch_ops {

// Functions of libtorch_cuda, looked up in the library that torch has already loaded: linked to, they would
// keep this library from loading beside a torch without CUDA, and from being built there.
inline void* torch_cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  check(library != nullptr, "kda: this torch has no CUDA");
  void* const function = dlsym(library, name);
  check(function != nullptr, "kda: this torch does not have {}", name);
  return function;
}

inline void check_torch(int32_t error, const char* name) { check(error == 0, "kda: {} failed", name); }

inline CUstream_st* current_stream(int32_t device) {
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

inline CudaType cuda_type(const char* name, const Tensor& tensor) {
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

// Elements from one row to the next of a tensor [N, ...] whose rows are contiguous.
inline int64_t row_stride(const char* name, const Tensor& tensor) {
  int64_t row = 1;
  for (int64_t i = tensor.dim() - 1; i >= 1; --i) {
    check(tensor.size(i) == 1 || tensor.stride(i) == row, "kda: within a token {} must be contiguous", name);
    row *= tensor.size(i);
  }
  if (tensor.size(0) <= 1) return row;
  check(tensor.stride(0) >= row, "kda: the tokens of {} overlap", name);
  return tensor.stride(0);
}

// What the kernels' parameters have in common. float32: whether the kernel takes q in float32.
template <class Params>
Params cuda_params(const Inputs& in, const Shape& shape, const Tensor& out, bool float32 = false) {
  check_type("k", in.k, in.q.scalar_type());
  check_type("v", in.v, in.q.scalar_type());
  check(float32 || in.q.scalar_type() != ScalarType::Float,
        "kda: q is float32, but the chunked CUDA kernels and the backward pass take bfloat16 and float16");
  Params p;
  set_sizes_and_options(p, in, shape);
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
  p.beta_scale = static_cast<float>(in.options.beta_scale);
  p.out = out.data_ptr();
  return p;
}

}  // namespace kilin::torch_ops
