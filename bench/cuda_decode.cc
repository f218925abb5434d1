// SPDX-License-Identifier: Apache-2.0
// The KDA decode step on a GPU: microseconds of one call in a CUDA graph, and what share of the copy
// bandwidth it reaches. Every call of the graph works on other slots, and all slots together are larger than
// the L2 cache.
//   bench_cuda_decode [--quick]
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/float16.h"
#include "base/random.h"
#include "cuda_probe.h"
#include "cuda_timing.h"
#include "kernels/cuda/device.h"
#include "kernels/kda/kda_decode_cuda.h"

namespace kilin {
namespace {

constexpr int64_t kPoolBytes = int64_t{1} << 30;  // of states, at least, that one graph walks through

template <class T>
T* device_array(const std::vector<T>& values) {
  T* data = nullptr;
  check_cuda(cudaMalloc(&data, values.size() * sizeof(T)), "cudaMalloc");
  check_cuda(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
             "cudaMemcpy");
  return data;
}

BFloat16* random_bf16(int64_t count, double deviation) {
  Random random(3);
  std::vector<BFloat16> values(static_cast<size_t>(std::min<int64_t>(count, 1 << 20)));
  for (BFloat16& x : values) x = to_bfloat16(static_cast<float>(deviation * random.normal()));
  BFloat16* data = nullptr;
  check_cuda(cudaMalloc(&data, count * 2), "cudaMalloc of {} bytes", 2 * count);
  for (int64_t at = 0; at < count; at += static_cast<int64_t>(values.size())) {
    const int64_t part = std::min<int64_t>(count - at, static_cast<int64_t>(values.size()));
    check_cuda(cudaMemcpy(data + at, values.data(), part * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  return data;
}

// Memory of a decode step for `sets` sets of B sequences.
struct Decode {
  KdaDecodeCudaParams params;
  int sets = 1;
  int32_t* slots = nullptr;
  std::vector<void*> owned;

  Decode(int batch, int tokens_each, int heads, int dim, CudaType state_type, bool fused) {
    const int64_t width = static_cast<int64_t>(heads) * dim;
    const int64_t state = width * dim;
    const int per_sequence = tokens_each;  // verification leaves a state per token
    const int64_t bytes = state * cuda_size(state_type) * batch * per_sequence;
    sets = static_cast<int>(std::max<int64_t>(2, (kPoolBytes + bytes - 1) / bytes));
    sets = std::min(sets, 256);
    const int64_t slot_count = static_cast<int64_t>(sets) * batch * per_sequence;
    const int64_t tokens = static_cast<int64_t>(batch) * tokens_each;
    std::vector<int32_t> order(static_cast<size_t>(slot_count));
    for (int64_t i = 0; i < slot_count; ++i) order[i] = static_cast<int32_t>(i);
    Random random(1);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    slots = keep(device_array(order));
    KdaDecodeCudaParams& p = params;
    p.heads = p.value_heads = heads, p.key_dim = p.value_dim = dim;
    p.sequences = batch, p.tokens = tokens;
    p.q = {keep(random_bf16(tokens * width, 1)), width}, p.k = {keep(random_bf16(tokens * width, 1)), width};
    p.v = {keep(random_bf16(tokens * width, 1)), width},
    p.gate = {keep(random_bf16(tokens * width, 1)), width};
    p.beta = {keep(random_bf16(tokens * heads, 1)), heads};
    p.beta_is_logit = true, p.gate_kind = KdaGate::kBounded, p.scale = 1 / std::sqrt(static_cast<float>(dim));
    p.a_log = keep(device_array(std::vector<float>(heads, 0.5f)));
    p.dt_bias = keep(device_array(std::vector<float>(width, -1.0f)));
    p.initial.data = keep(random_bf16(slot_count * state * cuda_size(state_type) / 2, 0.1));
    p.initial.type = state_type, p.initial.slot_stride = state;
    p.final = p.initial;
    if (fused) {
      const int rows = 3 + tokens_each - 1;
      p.conv = {keep(random_bf16(width * 4, 0.5)),
                keep(random_bf16(width * 4, 0.5)),
                keep(random_bf16(width * 4, 0.5)),
                CudaType::kBf16,
                keep(random_bf16(slot_count * rows * 3 * width, 1)),
                rows * 3 * width,
                rows,
                nullptr,
                true};
      p.norm = {keep(random_bf16(dim, 1)),
                CudaType::kBf16,
                1e-5f,
                {keep(random_bf16(tokens * width, 1)), width},
                GateActivation::kSigmoid};
    }
    p.out = keep(random_bf16(tokens * width, 1)), p.out_stride = width;
  }
  ~Decode() {
    for (void* data : owned) static_cast<void>(cudaFree(data));
  }
  Decode(const Decode&) = delete;
  Decode& operator=(const Decode&) = delete;

  template <class T>
  T* keep(T* data) {
    owned.push_back(data);
    return data;
  }
  void run(int set, cudaStream_t stream) const {
    KdaDecodeCudaParams p = params;
    const int64_t each = p.tokens / p.sequences;
    const int32_t* mine = slots + set * p.tokens;
    p.conv.slots = mine;
    if (each == 1) {
      p.initial.slots = p.final.slots = mine;
    } else {
      p.token_slots = mine, p.token_slot_stride = each;
    }
    kda_decode_cuda(p, stream);
  }
};

void report(const char* name, Decode& decode, int split, double copy) {
  decode.params.split = split;
  const double us = graph_time(decode.sets, [&](int set, cudaStream_t stream) { decode.run(set, stream); });
  KdaDecodeCudaParams p = decode.params;
  const double state_bytes = static_cast<double>(p.sequences + p.tokens) * p.value_heads * p.key_dim *
                             p.value_dim * cuda_size(p.final.type);
  const double all = kda_decode_bytes(p) +
                     (p.tokens > p.sequences ? state_bytes - 2.0 * p.sequences * p.value_heads * p.key_dim *
                                                                 p.value_dim * cuda_size(p.final.type)
                                             : 0);
  fmt::print(
      "{:<22} B {:>3} T {} H {} D {:>3} split {}  {:8.2f} us  states {:6.0f} GB/s {:5.1f} %  all {:5.1f} %\n",
      name, p.sequences, p.tokens / p.sequences, p.heads, p.key_dim,
      split != 0 ? split : kda_decode_split(p, cuda_device().multiprocessors), us, state_bytes / us * 1e-3,
      100 * state_bytes / us * 1e-3 / copy, 100 * all / us * 1e-3 / copy);
}

void ceilings(double& copy) {
  const int64_t bytes = int64_t{1} << 30;
  char* data = nullptr;
  check_cuda(cudaMalloc(&data, 2 * bytes), "cudaMalloc");
  check_cuda(cudaMemset(data, 0x3c, 2 * bytes), "cudaMemset");
  const double us = graph_time(4, [&](int, cudaStream_t stream) {
    check_cuda(cudaMemcpyAsync(data + bytes, data, bytes, cudaMemcpyDeviceToDevice, stream),
               "cudaMemcpyAsync");
  });
  copy = 2e-3 * static_cast<double>(bytes) / us;
  fmt::print("copy of 1 GiB: {:.0f} GB/s (read + written)\n", copy);
  for (const int64_t chunks : {int64_t{4096}, int64_t{16384}}) {
    for (int way = 0; way < kRewriteWays; ++way) {
      const double time = graph_time(4, [&](int i, cudaStream_t stream) {
        rewrite_probe(way, reinterpret_cast<float*>(data + (i % 2) * bytes), chunks, stream);
      });
      const double rate = 131.072 * static_cast<double>(chunks) / time;
      fmt::print("rewrite in place, {:>5} x 64 KB, way {}: {:8.2f} us {:6.0f} GB/s {:5.1f} % of copy\n",
                 chunks, way, time, rate, 100 * rate / copy);
    }
  }
  check_cuda(cudaFree(data), "cudaFree");
}

int run(bool quick) {
  if (!cuda_available()) {
    fmt::print(stderr, "bench_cuda_decode: no GPU of compute capability 9.0\n");
    return 1;
  }
  double copy = 0;
  ceilings(copy);
  for (const int batch : {1, 2, 4, 16, 128, 512}) {
    if (quick && (batch == 2 || batch == 4)) continue;
    Decode decode(batch, 1, 32, 128, CudaType::kF32, true);
    for (const int split : {1, 2, 4, 8}) {
      if (batch >= 128 && split == 8) continue;
      report("fused", decode, split, copy);
    }
    report("fused", decode, 0, copy);
  }
  if (quick) return 0;
  for (const int batch : {1, 128}) {
    Decode plain(batch, 1, 32, 128, CudaType::kF32, false);
    report("no conv, no norm", plain, 0, copy);
    Decode half(batch, 1, 32, 128, CudaType::kBf16, true);
    report("fused, bf16 state", half, 0, copy);
    Decode small(batch, 1, 32, 64, CudaType::kF32, true);
    report("fused", small, 0, copy);
    Decode few(batch, 1, 12, 128, CudaType::kF32, true);
    report("fused", few, 0, copy);
    Decode verify(batch, 4, 32, 128, CudaType::kF32, true);
    for (const int split : {1, 2, 4}) report("verify", verify, split, copy);
  }
  return 0;
}

}  // namespace
}  // namespace kilin

int main(int argc, char** argv) {
  try {
    return kilin::run(argc > 1 && std::string(argv[1]) == "--quick");
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_cuda_decode: {}\n", error.what());
    return 1;
  }
}
