// SPDX-License-Identifier: Apache-2.0
// Times kda_chunk_cuda on the GPU: kernel time by CUDA graph replays over inputs that rotate past the L2, and
// the share of the byte floor (q, k, v, gate, out once at the copy bandwidth measured here).
//   bench_cuda_kda [--once] [FILTER]   --once: one call per shape, for a profiler; FILTER: part of a shape's
//   name
// Decays are mild (A_log and dt_bias zero), in rows named "spread" those of bench/kda_gpu.py: they differ
// from channel to channel and from head to head, as in trained models.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/kda/kda_cuda.h"

namespace kilin {
namespace {

// In [0, 1), without a pattern.
__device__ float uniform(int64_t i, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  h ^= h >> 16;
  return static_cast<float>(h >> 8) / 16777216.0f;
}

// Values in [-2, 2), offset added; with `normal` of mean 0 and deviation 1.
__global__ void fill(uint16_t* x, int64_t count, uint32_t seed, float offset, bool normal = false) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float first = uniform(i, seed);
    const float value =
        normal ? sqrtf(-2.0f * logf(1.0f - first)) * cospif(2.0f * uniform(i, seed ^ 0x9E3779B9u))
               : first * 4.0f - 2.0f;
    x[i] = static_cast<uint16_t>(__float_as_uint(value + offset) >> 16);
  }
}

struct Memory {
  void* data = nullptr;
  explicit Memory(size_t bytes) {
    check_cuda(cudaMalloc(&data, std::max<size_t>(bytes, 1)), "cudaMalloc of {} bytes", bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { static_cast<void>(cudaFree(data)); }
};

// Median milliseconds of a graph of `body`, which is called with 0 to rounds - 1, per round.
template <class Body>
double time_graph(int rounds, cudaStream_t stream, Body body) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < rounds; ++i) body(i);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    check_cuda(cudaEventRecord(begin, stream), "event");
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check_cuda(cudaEventRecord(end, stream), "event");
    check_cuda(cudaEventSynchronize(end), "kernel");
    float ms;
    check_cuda(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 2) times.push_back(ms / static_cast<float>(rounds));
  }
  std::sort(times.begin(), times.end());
  check_cuda(cudaGraphExecDestroy(executable), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  return times[times.size() / 2];
}

__global__ void copy(const uint4* from, uint4* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x)
    to[i] = from[i];
}

// GB/s, bytes read and written.
double copy_bandwidth(cudaStream_t stream) {
  const size_t bytes = size_t{1} << 30;
  Memory from(bytes), to(bytes);
  fill<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(from.data), static_cast<int64_t>(bytes / 2), 1, 0.0f);
  const int64_t count = static_cast<int64_t>(bytes / 16);
  const double ms = time_graph(4, stream, [&](int) {
    copy<<<static_cast<unsigned>(count / 1024), 1024, 0, stream>>>(static_cast<const uint4*>(from.data),
                                                                   static_cast<uint4*>(to.data), count);
  });
  return 2.0 * static_cast<double>(bytes) / ms * 1e-6;
}

const char* plan_name(KdaCudaPlan plan) {
  switch (plan) {
    case KdaCudaPlan::kAuto:
      return "auto";
    case KdaCudaPlan::kFused:
      return "fused";
    case KdaCudaPlan::kTwoKernels:
      return "two";
    case KdaCudaPlan::kSegments:
      return "segments";
    case KdaCudaPlan::kPipe:
      return "pipe";
  }
  return "";
}

struct Shape {
  const char* name;
  std::vector<int> lengths;
  int heads;
  bool spread = false;  // decays of bench/kda_gpu.py
};

// A_log of each head and dt_bias of each channel, with the distributions of bench/kda_gpu.py.
void fill_spread(const Shape& shape, KdaGate gate, int dim, float* a_log, float* bias) {
  const bool softplus = gate == KdaGate::kSoftplus;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.0f, softplus ? 2.7f : 0.81f);
  std::normal_distribution<float> normal(softplus ? -3.0f : -4.0f, 1.0f);
  std::vector<float> of_heads(static_cast<size_t>(shape.heads)),
      of_channels(of_heads.size() * static_cast<size_t>(dim));
  for (float& x : of_heads) x = uniform(random);
  for (float& x : of_channels) x = normal(random);
  check_cuda(cudaMemcpy(a_log, of_heads.data(), of_heads.size() * 4, cudaMemcpyHostToDevice), "copy");
  check_cuda(cudaMemcpy(bias, of_channels.data(), of_channels.size() * 4, cudaMemcpyHostToDevice), "copy");
}

void time_shape(const Shape& shape, KdaGate gate_kind, KdaCudaPlan plan, bool once, double bandwidth,
                cudaStream_t stream) {
  constexpr int kDim = 128;
  int64_t tokens = 0;
  std::vector<int32_t> cu{0};
  for (const int n : shape.lengths) cu.push_back(static_cast<int32_t>(tokens += n));
  const int64_t width = int64_t{shape.heads} * kDim;
  const int64_t bytes = tokens * width * 2;
  const int sets =
      once ? 1 : static_cast<int>(std::clamp<int64_t>((int64_t{200} << 20) / (5 * bytes) + 1, 2, 16));
  Memory q(bytes * sets), k(bytes * sets), v(bytes * sets), gate(bytes * sets), out(bytes * sets);
  Memory beta(tokens * shape.heads * 2), a_log(shape.heads * 4), bias(width * 4), offsets(cu.size() * 4);
  Memory state(shape.lengths.size() * static_cast<size_t>(shape.heads) * kDim * kDim * 4);
  uint32_t seed = 1;
  for (const Memory* m : {&q, &k, &v, &gate})
    fill<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(m->data), tokens * width * sets, seed++ * 7919,
                                   m == &gate && !shape.spread ? -2.0f : 0.0f, m == &gate && shape.spread);
  fill<<<64, 256, 0, stream>>>(static_cast<uint16_t*>(beta.data), tokens * shape.heads, 99, 0.0f);
  check_cuda(cudaMemsetAsync(a_log.data, 0, static_cast<size_t>(shape.heads) * 4, stream), "memset");
  check_cuda(cudaMemsetAsync(bias.data, 0, static_cast<size_t>(width) * 4, stream), "memset");
  if (shape.spread)
    fill_spread(shape, gate_kind, kDim, static_cast<float*>(a_log.data), static_cast<float*>(bias.data));
  check_cuda(cudaMemcpy(offsets.data, cu.data(), cu.size() * 4, cudaMemcpyHostToDevice), "copy");
  KdaCudaParams p;
  p.heads = p.value_heads = shape.heads;
  p.key_dim = p.value_dim = kDim;
  p.sequences = static_cast<int>(shape.lengths.size());
  p.tokens = tokens;
  if (p.sequences > 1) p.cu_seqlens = offsets.data;
  p.beta = {beta.data, shape.heads};
  p.gate_kind = gate_kind;
  p.a_log = static_cast<const float*>(a_log.data);
  p.dt_bias = static_cast<const float*>(bias.data);
  p.beta_is_logit = true;
  p.scale = 0.08838835f;
  p.plan = plan;
  p.out_stride = width;
  p.final = {state.data, CudaType::kF32, width * kDim, nullptr};
  const auto with_set = [&](int i) {
    const auto at = [&](const Memory& m) { return static_cast<uint8_t*>(m.data) + (i % sets) * bytes; };
    p.q = {at(q), width};
    p.k = {at(k), width};
    p.v = {at(v), width};
    p.gate = {at(gate), width};
    p.out = at(out);
  };
  with_set(0);
  Memory workspace(kda_chunk_cuda_workspace(p));
  const size_t workspace_bytes = kda_chunk_cuda_workspace(p);
  const auto call = [&](int i) {
    with_set(i);
    kda_chunk_cuda(p, workspace.data, workspace_bytes, stream);
  };
  call(0);
  check_cuda(cudaStreamSynchronize(stream), "kda_chunk_cuda");
  if (once) return;
  const double ms = time_graph(std::max(sets, 8), stream, call);
  const double floor = 5.0 * static_cast<double>(bytes) / bandwidth * 1e-6;
  std::printf("%-16s %-8s %-8s %8.4f ms  floor %.4f ms  %5.1f %%\n", shape.name,
              gate_kind == KdaGate::kBounded ? "bounded" : "softplus", plan_name(plan), ms, floor,
              100.0 * floor / ms);
  std::fflush(stdout);
}

int main_(int argc, char** argv) {
  bool once = false;
  std::string filter;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--once") == 0) {
      once = true;
    } else {
      filter = argv[i];
    }
  }
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  const double bandwidth = once ? 1.0 : copy_bandwidth(stream);
  if (!once) std::printf("copy bandwidth %.2f TB/s\n", bandwidth * 1e-3);
  const std::vector<Shape> shapes = {{"T8192 H96", {8192}, 96},
                                     {"T8192 H64", {8192}, 64},
                                     {"T8192 H44", {8192}, 44},
                                     {"T8192 H40", {8192}, 40},
                                     {"T8192 H32", {8192}, 32},
                                     {"T8192 H24", {8192}, 24},
                                     {"T8192 H16", {8192}, 16},
                                     {"T512 H32", {512}, 32},
                                     {"T2048 H32", {2048}, 32},
                                     {"T2048 H40", {2048}, 40},
                                     {"T4096 H24", {4096}, 24},
                                     {"T32768 H44", {32768}, 44},
                                     {"T32768 H32", {32768}, 32},
                                     {"T131072 H32", {131072}, 32},
                                     {"T65536 H8", {65536}, 8},
                                     {"T32768 H16", {32768}, 16},
                                     {"T8192 H8", {8192}, 8},
                                     {"T2048 H8", {2048}, 8},
                                     {"T32768 H1", {32768}, 1},
                                     {"8x1024 H96", std::vector<int>(8, 1024), 96},
                                     {"mixed H96", {1300, 547, 2048, 963, 271, 3063}, 96},
                                     {"T8192 H96 spread", {8192}, 96, true},
                                     {"T8192 H64 spread", {8192}, 64, true}};
  for (const Shape& shape : shapes) {
    if (std::string(shape.name).find(filter) == std::string::npos) continue;
    for (const KdaGate gate : {KdaGate::kBounded, KdaGate::kSoftplus}) {
      for (const KdaCudaPlan plan :
           {KdaCudaPlan::kFused, KdaCudaPlan::kTwoKernels, KdaCudaPlan::kSegments, KdaCudaPlan::kPipe}) {
        // Segments where there is room for them.
        if (plan == KdaCudaPlan::kSegments && shape.heads * shape.lengths.size() > 16) continue;
        if (plan == KdaCudaPlan::kPipe && shape.heads * shape.lengths.size() > 44) continue;
        time_shape(shape, gate, plan, once, bandwidth, stream);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace kilin

int main(int argc, char** argv) {
  try {
    return kilin::main_(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda_kda: %s\n", error.what());
    return 1;
  }
}
