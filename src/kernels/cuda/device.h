// SPDX-License-Identifier: Apache-2.0
// What the kernels of this folder ask of the GPU they run on.
#pragma once
#include <cstdint>

namespace kilin {

// The current device, asked of the driver once per device.
struct CudaDevice {
  int multiprocessors = 0;
  int major = 0, minor = 0;     // compute capability
  int shared_memory_limit = 0;  // bytes that one block may ask for
  int64_t l2_bytes = 0;
};

// Throws Error when there is no usable device. Makes no CUDA call that a graph capture forbids.
const CudaDevice& cuda_device();

// Whether a GPU is there that runs code for sm_90a.
bool cuda_available();

}  // namespace kilin
