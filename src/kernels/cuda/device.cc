// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device.h"

#include <cudaTypedefs.h>

#include <algorithm>
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

// A function of the driver, or null where the driver has none: programs are not linked with it.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

// Multiprocessors of the current context. Under MPS the device's attribute is what the client, or the
// context, is given (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE); a green context has its part as a resource.
int context_multiprocessors(int device) {
  static const auto id_of = driver_function<PFN_cuCtxGetId_v12000>("cuCtxGetId", 12000);
  static const auto resource_of =
      driver_function<PFN_cuCtxGetDevResource_v12040>("cuCtxGetDevResource", 12040);
  static const auto current = driver_function<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent", 4000);
  static thread_local unsigned long long last_id = 0;
  static thread_local int last_device = -1, last_count = 0;
  CUcontext context = nullptr;
  unsigned long long id = 0;
  // Without a context yet, the device's primary one will be made. Green contexts came after cuCtxGetId.
  const bool known = id_of != nullptr && current != nullptr && current(&context) == CUDA_SUCCESS &&
                     context != nullptr && id_of(context, &id) == CUDA_SUCCESS;
  if (known && device == last_device && id == last_id) return last_count;  // no two contexts have one id
  int count = attribute(cudaDevAttrMultiProcessorCount, device);
  if (!known) return count;
  CUdevResource resource{};
  // Drivers that cannot tell have no green contexts.
  if (resource_of != nullptr && resource_of(context, &resource, CU_DEV_RESOURCE_TYPE_SM) == CUDA_SUCCESS)
    count = std::min(count, static_cast<int>(resource.sm.smCount));
  last_id = id;
  last_device = device;
  last_count = count;
  return count;
}

}  // namespace

CudaDevice cuda_device() {
  static std::array<CudaDevice, kDevices> devices;
  static std::array<std::once_flag, kDevices> asked;
  int number = 0;
  check_cuda(cudaGetDevice(&number), "cudaGetDevice");
  check(number < kDevices, "CUDA device {} is one too many: {} are provided for", number, kDevices);
  std::call_once(asked[number], [number] {
    devices[number] = {.multiprocessors = 0,
                       .major = attribute(cudaDevAttrComputeCapabilityMajor, number),
                       .minor = attribute(cudaDevAttrComputeCapabilityMinor, number),
                       .shared_memory_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, number),
                       .l2_bytes = attribute(cudaDevAttrL2CacheSize, number)};
  });
  CudaDevice device = devices[number];
  device.multiprocessors = context_multiprocessors(number);
  return device;
}

bool cuda_available() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  const CudaDevice device = cuda_device();
  return device.major == 9 && device.minor == 0;
}

}  // namespace kilin
