// SPDX-License-Identifier: Apache-2.0
#include "cuda_probe.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/ptx.cuh"

namespace kilin {
namespace {

using namespace cuda;

template <int kPieces, bool kStreaming>
__global__ void __launch_bounds__(256, 2) rewrite_registers(float4* data, float factor) {
  float4* at = data + static_cast<int64_t>(blockIdx.x) * kPieces * 256 + threadIdx.x;
  float4 x[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) x[i] = kStreaming ? __ldcs(at + i * 256) : at[i * 256];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    x[i].x *= factor, x[i].y *= factor, x[i].z *= factor, x[i].w *= factor;
    kStreaming ? __stcs(at + i * 256, x[i]) : static_cast<void>(at[i * 256] = x[i]);
  }
}

// Copies `bytes` (a multiple of 16) to shared memory; the barrier, which has one arrival, completes when they
// are there. One thread calls it.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  barrier_arrive_expect(shared_address(barrier), bytes);
  cuda::bulk_load(shared_address(to), from, bytes, shared_address(barrier));
}

template <int kBytes, int kStages>
__global__ void __launch_bounds__(256, 1) rewrite_bulk(char* data, int64_t pieces, float factor) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t barriers[kStages];
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : barriers) barrier_init(shared_address(&barrier), 1);
    barrier_init_fence();
  }
  __syncthreads();
  const int64_t step = gridDim.x;
  constexpr int kAhead = kStages - 2;  // loads in flight; the other stages are being stored
  if (threadIdx.x == 0) {
    for (int i = 0; i < kAhead; ++i) {
      const int64_t piece = blockIdx.x + i * step;
      if (piece < pieces) bulk_load(stages + i * kBytes, data + piece * kBytes, kBytes, &barriers[i]);
    }
  }
  int n = 0;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += step, ++n) {
    if (threadIdx.x == 0 && piece + kAhead * step < pieces) {
      // The stage's last store was two iterations ago.
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      const int stage = (n + kAhead) % kStages;
      bulk_load(stages + stage * kBytes, data + (piece + kAhead * step) * kBytes, kBytes, &barriers[stage]);
    }
    const int stage = n % kStages;
    barrier_wait(shared_address(&barriers[stage]), n / kStages % 2);
    float4* at = reinterpret_cast<float4*>(stages + stage * kBytes) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kBytes / 16 / 256; ++i) {
      float4 x = at[i * 256];
      x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
      at[i * 256] = x;
    }
    async_proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(data + piece * kBytes, shared_address(stages + stage * kBytes), kBytes);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait();
}

template <int kBytes, int kStages>
void launch_bulk(float* data, int64_t chunks, cudaStream_t stream) {
  const int bytes = kBytes * kStages;
  check_cuda(
      cudaFuncSetAttribute(rewrite_bulk<kBytes, kStages>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "cudaFuncSetAttribute");
  rewrite_bulk<kBytes, kStages>
      <<<132, 256, bytes, stream>>>(reinterpret_cast<char*>(data), chunks * 65536 / kBytes, 0.999f);
}

}  // namespace

void rewrite_probe(int way, float* data, int64_t chunks, CUstream_st* stream) {
  const unsigned grid = static_cast<unsigned>(chunks);
  float4* wide = reinterpret_cast<float4*>(data);
  switch (way) {
    case 0:
      rewrite_registers<16, false><<<grid, 256, 0, stream>>>(wide, 0.999f);
      break;
    case 1:
      rewrite_registers<16, true><<<grid, 256, 0, stream>>>(wide, 0.999f);
      break;
    case 2:
      launch_bulk<16384, 12>(data, chunks, stream);
      break;
    case 3:
      launch_bulk<32768, 6>(data, chunks, stream);
      break;
    case 4:
      rewrite_registers<8, true><<<2 * grid, 256, 0, stream>>>(wide, 0.999f);
      break;
    default:
      fail("rewrite_probe: way {}", way);
  }
  check_launch("rewrite_probe");
}

}  // namespace kilin
