// SPDX-License-Identifier: Apache-2.0
// What the kernels of this folder ask of the GPU they run on.
#pragma once
#include <cstdint>

namespace kilin {

// The current device and what the current context may use of it.
struct CudaDevice {
  // Of the context: fewer than the chip has in a green context, or under MPS with a share of it.
  int multiprocessors = 0;
  int major = 0, minor = 0;     // compute capability
  int shared_memory_limit = 0;  // bytes that one block may ask for
  int64_t l2_bytes = 0;
};

// Throws Error when there is no usable device. Asks the driver once per device and, for the multiprocessors,
// when a thread comes with another context; makes no CUDA call that a graph capture forbids.
CudaDevice cuda_device();

// Whether a GPU is there that runs code for sm_90a.
bool cuda_available();

}  // namespace kilin
