// SPDX-License-Identifier: Apache-2.0
// What the interfaces of the CUDA kernels share. Plain: no CUDA headers.
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t

namespace kilin {

enum class CudaType : uint8_t { kF32, kF16, kBf16 };

constexpr int cuda_size(CudaType type) { return type == CudaType::kF32 ? 4 : 2; }

// A tensor of T tokens.
struct CudaTokens {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from one token to the next
};

// State pool: slot s of value head h at data + s * slot_stride + h * V * K.
struct CudaStates {
  void* data = nullptr;
  CudaType type = CudaType::kF32;  // kF32 or kBf16
  int64_t slot_stride = 0;         // elements
  // Slot of each sequence [N] on the device; null: sequence n has slot n. A negative slot reads as a zero
  // state and is not written.
  const int32_t* slots = nullptr;
};

}  // namespace kilin
