// SPDX-License-Identifier: Apache-2.0
// Times kda_backward_cuda on the GPU by CUDA graph replays (every tensor of these shapes is larger than the
// L2 cache).
//   bench_cuda_kda_backward [--once]   --once: one call of the first shape, for a profiler
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/kda/kda_backward_cuda.h"

namespace kilin {
namespace {

// Values of size times [-2, 2) without a pattern, offset added.
__global__ void fill(uint16_t* x, int64_t count, uint32_t seed, float offset) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    h ^= h >> 16;
    const float value = static_cast<float>(h) / 4294967296.0f * 4.0f - 2.0f + offset;
    x[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

// Device memory of one shape, freed together.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* p : blocks_) static_cast<void>(cudaFree(p));
  }
  void* take(size_t bytes) {
    void* p = nullptr;
    check_cuda(cudaMalloc(&p, std::max<size_t>(bytes, 1)), "cudaMalloc of {} bytes", bytes);
    blocks_.push_back(p);
    return p;
  }

 private:
  std::vector<void*> blocks_;
};

struct Shape {
  int sequences, tokens, heads, dim;
};

KdaBackwardCudaParams make_problem(const Shape& shape, KdaGate gate, Memory& memory, cudaStream_t stream) {
  const int64_t tokens = int64_t{shape.tokens} * shape.sequences;
  const int64_t width = int64_t{shape.heads} * shape.dim;
  uint32_t seed = 1;
  const auto tensor = [&](int64_t row, float offset) {
    void* x = memory.take(static_cast<size_t>(tokens * row) * 2);
    fill<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(x), tokens * row, seed++ * 7919, offset);
    check_launch("fill");
    return x;
  };
  const auto zeros = [&](int64_t count) {
    void* x = memory.take(static_cast<size_t>(count) * 4);
    check_cuda(cudaMemsetAsync(x, 0, static_cast<size_t>(count) * 4, stream), "cudaMemsetAsync");
    return static_cast<float*>(x);
  };
  KdaBackwardCudaParams p;
  KdaCudaParams& f = p.forward;
  f.heads = f.value_heads = shape.heads;
  f.key_dim = f.value_dim = shape.dim;
  f.sequences = shape.sequences;
  f.tokens = tokens;
  f.q = {tensor(width, 0.0f), width};
  f.k = {tensor(width, 0.0f), width};
  f.v = {tensor(width, 0.0f), width};
  f.gate = {tensor(width, -2.0f), width};
  f.beta = {tensor(shape.heads, 0.0f), shape.heads};
  f.gate_kind = gate;
  f.a_log = zeros(shape.heads);
  f.dt_bias = zeros(width);
  f.beta_is_logit = true;
  f.scale = 0.088f;
  p.d_out = {tensor(width, 0.0f), width};
  p.d_q = {tensor(width, 0.0f), width};
  p.d_k = {tensor(width, 0.0f), width};
  p.d_v = {tensor(width, 0.0f), width};
  p.d_gate = {tensor(width, 0.0f), width};
  p.d_beta = {tensor(shape.heads, 0.0f), shape.heads};
  p.d_a_log = zeros(shape.heads);
  p.d_dt_bias = zeros(width);
  return p;
}

// Median milliseconds of one call, four in a graph.
float time_calls(const KdaBackwardCudaParams& p, void* workspace, size_t bytes, cudaStream_t stream) {
  constexpr int kCalls = 4;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < kCalls; ++i) kda_backward_cuda(p, workspace, bytes, stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    check_cuda(cudaEventRecord(begin, stream), "event");
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check_cuda(cudaEventRecord(end, stream), "event");
    check_cuda(cudaEventSynchronize(end), "kernel");
    float ms;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 2) times.push_back(ms / kCalls);
  }
  std::sort(times.begin(), times.end());
  check_cuda(cudaGraphExecDestroy(executable), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  return times[times.size() / 2];
}

int main_(bool once) {
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  const std::vector<Shape> shapes = {
      {1, 8192, 32, 128}, {1, 8192, 16, 128}, {4, 4096, 32, 128}, {1, 8192, 96, 128}, {1, 8192, 32, 64}};
  for (const Shape& shape : shapes) {
    for (const KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded}) {
      Memory memory;
      const KdaBackwardCudaParams p = make_problem(shape, gate, memory, stream);
      const size_t bytes = kda_backward_cuda_workspace(p);
      void* workspace = memory.take(bytes);
      kda_backward_cuda(p, workspace, bytes, stream);
      check_cuda(cudaStreamSynchronize(stream), "kda_backward_cuda");
      if (once) return 0;
      std::printf("N %d T %d H %d D %d %s: %.3f ms, workspace %.0f MB\n", shape.sequences, shape.tokens,
                  shape.heads, shape.dim, gate == KdaGate::kBounded ? "bounded" : "softplus",
                  static_cast<double>(time_calls(p, workspace, bytes, stream)),
                  static_cast<double>(bytes) * 1e-6);
      std::fflush(stdout);
    }
  }
  return 0;
}

}  // namespace
}  // namespace kilin

int main(int argc, char** argv) {
  try {
    return kilin::main_(argc > 1 && std::strcmp(argv[1], "--once") == 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda_kda_backward: %s\n", error.what());
    return 1;
  }
}
