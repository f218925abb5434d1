// SPDX-License-Identifier: Apache-2.0
// Host code that the launches of the chunk kernels and of the gradient kernels share, and the tables of
// chunks that sequences of different lengths need.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/kda/kda_cuda.h"
#include "kernels/kda/kda_layout_sm90.cuh"

namespace kilin::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline size_t aligned(int64_t bytes) { return static_cast<size_t>(divide_up(bytes, 256) * 256); }

// Upper bound of the number of chunks of kTokens.
template <int kTokens>
int64_t chunk_bound(const KdaCudaParams& p) {
  if (p.sequences == 0) return 0;
  if (p.cu_seqlens == nullptr) return p.sequences * divide_up(p.tokens / p.sequences, kTokens);
  return p.tokens / kTokens + std::min<int64_t>(p.sequences, p.tokens);
}

// Chunk tables of sequences of different lengths. One block.
template <int kTokens, class Offset>
__global__ void kda_chunk_table(const Offset* cu_seqlens, int sequences, int32_t* offsets, int64_t* starts,
                                int64_t* chunks) {
  __shared__ int64_t sums[32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  int64_t before = 0;  // chunks of the sequences before this round
  for (int n0 = 0; n0 < sequences; n0 += 1024) {
    const int n = n0 + thread;
    const int64_t length = n < sequences ? cu_seqlens[n + 1] - cu_seqlens[n] : 0;
    const int64_t own = (length + kTokens - 1) / kTokens;
    int64_t sum = own;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < 32; ++w) {
      if (w == warp) sum += total;
      total += sums[w];
    }
    if (n < sequences) {
      offsets[n] = static_cast<int32_t>(before + sum - own);
      starts[n] = cu_seqlens[n];
    }
    before += total;
    __syncthreads();
  }
  if (thread == 0) {
    offsets[sequences] = static_cast<int32_t>(before);
    starts[sequences] = cu_seqlens[sequences];
  }
  __syncthreads();
  for (int n = warp; n < sequences; n += 32) {
    const int64_t length = starts[n + 1] - starts[n];
    for (int64_t c = lane; c * kTokens < length; c += 32) {
      const int64_t tokens = min(length - c * kTokens, static_cast<int64_t>(kTokens));
      chunks[offsets[n] + c] = (starts[n] + c * kTokens) | ((tokens - 1) << 56);
    }
  }
}

// Fills the tables of chunks (in device memory, as large as they must be) when the sequences differ in
// length, and tells where every chunk lies.
template <int kTokens>
KdaLayout make_layout(const KdaCudaParams& p, int32_t* offsets, int64_t* starts, int64_t* chunks,
                      cudaStream_t stream) {
  KdaLayout layout{.sequences = p.sequences};
  if (p.cu_seqlens == nullptr) {
    layout.length = p.tokens / p.sequences;
    layout.chunks_per_sequence = static_cast<int>(divide_up(layout.length, kTokens));
    return layout;
  }
  const auto fill = [&](const auto* cu_seqlens) {
    kda_chunk_table<kTokens><<<1, 1024, 0, stream>>>(cu_seqlens, p.sequences, offsets, starts, chunks);
    check_launch("kda_chunk_table");
  };
  if (p.wide_seqlens) {
    fill(static_cast<const int64_t*>(p.cu_seqlens));
  } else {
    fill(static_cast<const int32_t*>(p.cu_seqlens));
  }
  layout.offsets = offsets;
  layout.starts = starts;
  layout.chunks = chunks;
  return layout;
}

// kOverlapping: may begin before the kernel in front of it ends (grid_wait). kTogether: all blocks run at the
// same time, or the launch fails.
enum class LaunchKind : uint8_t { kPlain, kOverlapping, kTogether };

template <class... Args>
void launch(void (*kernel)(Args...), const char* name, int64_t blocks, int threads, int shared_bytes,
            LaunchKind kind, cudaStream_t stream, const std::type_identity_t<Args>&... args) {
  if (blocks == 0) return;
  check(blocks < (int64_t{1} << 31), "{}: {} blocks are too many for one launch", name, blocks);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "{}: {} bytes of shared memory", name, shared_bytes);
  cudaLaunchAttribute attribute{};
  if (kind == LaunchKind::kOverlapping) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kind == LaunchKind::kPlain ? 0 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launch of {}, {} blocks{}", name, blocks,
             kind == LaunchKind::kTogether ? " at the same time" : "");
}

}  // namespace kilin::cuda
