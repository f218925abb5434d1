// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device.h"

#include <array>
#include <mutex>

#include "kernels/cuda/check.h"

namespace kilin {
namespace {

constexpr int kDevices = 64;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

const CudaDevice& cuda_device() {
  static std::array<CudaDevice, kDevices> devices;
  static std::array<std::once_flag, kDevices> asked;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check(device < kDevices, "CUDA device {} is one too many: {} are provided for", device, kDevices);
  std::call_once(asked[device], [device] {
    devices[device] = {.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
                       .major = attribute(cudaDevAttrComputeCapabilityMajor, device),
                       .minor = attribute(cudaDevAttrComputeCapabilityMinor, device),
                       .shared_memory_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                       .l2_bytes = attribute(cudaDevAttrL2CacheSize, device)};
  });
  return devices[device];
}

bool cuda_available() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  const CudaDevice& device = cuda_device();
  return device.major == 9 && device.minor == 0;
}

}  // namespace kilin
