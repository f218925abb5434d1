// SPDX-License-Identifier: Apache-2.0
// CUDA's error codes as base/error.h's Error. Host code only.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "base/error.h"

namespace kilin {

// check_cuda(cudaMalloc(&p, n), "cudaMalloc of {} bytes", n) throws Error naming the call and CUDA's own
// text.
template <class... Args>
void check_cuda(cudaError_t status, fmt::format_string<Args...> what, Args&&... args) {
  if (status != cudaSuccess) [[unlikely]] {
    static_cast<void>(cudaGetLastError());  // an error that is not sticky must not show up in the next check
    fail("{}: CUDA error {}: {}", fmt::format(what, std::forward<Args>(args)...), cudaGetErrorName(status),
         cudaGetErrorString(status));
  }
}

// Right behind a launch: what went wrong with the launch itself (faults of the running kernel show up later).
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), "launch of {}", kernel); }

namespace cuda {

// Rows of 16-bit values that are read or written 16 bytes at a time.
inline void check_rows(const char* kernel, const char* name, const void* data, int64_t stride, int64_t width,
                       int64_t rows) {
  check(rows == 0 || (data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride >= width &&
                      stride % 8 == 0),
        "{}: {} is null, not aligned to 16 bytes, or its stride {} is no multiple of 8 from {} on", kernel,
        name, stride, width);
}

}  // namespace cuda
}  // namespace kilin
