// SPDX-License-Identifier: Apache-2.0
// Device code: barriers and shared memory of a thread block cluster (PTX ISA, barrier.cluster and mapa).
#pragma once
#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace kilin::cuda {

// Arrives without ordering memory accesses (a release would wait for all stores of the thread).
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// As barrier_wait, and what other CTAs wrote before they reported to the barrier is visible.
__device__ __forceinline__ void cluster_barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n wait:\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra wait;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Writes to the place that `local` has in the shared memory of the cluster's CTA `rank`, and reports the four
// bytes to the mbarrier at the place of `barrier` there.
__device__ __forceinline__ void store_to_rank(float* local, uint64_t* barrier, uint32_t rank, float value) {
  uint32_t there;
  uint32_t barrier_there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(local)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(barrier_there)
               : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
               "r"(__float_as_uint(value)), "r"(barrier_there)
               : "memory");
}

}  // namespace kilin::cuda
