// SPDX-License-Identifier: Apache-2.0
// The chunked form on the GPU against the recurrence in double precision (kda_reference.h).
#include "kernels/kda/kda_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/gpu_test.h"
#include "kernels/kda/kda_recurrent_cuda.h"
#include "kernels/kda/kda_reference.h"

namespace kilin {
namespace {

float round_to(CudaType type, float x) {
  if (type == CudaType::kF32) return x;
  if (type == CudaType::kF16) return static_cast<float>(static_cast<_Float16>(x));
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7FFF + ((bits >> 16) & 1);
  bits &= 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Bytes of values in a type, and back.
std::vector<uint8_t> encode(CudaType type, const std::vector<float>& values) {
  std::vector<uint8_t> bytes(values.size() * (type == CudaType::kF32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    const float x = round_to(type, values[i]);
    if (type == CudaType::kF32) {
      std::memcpy(&bytes[4 * i], &x, 4);
    } else if (type == CudaType::kF16) {
      const _Float16 half = static_cast<_Float16>(x);
      std::memcpy(&bytes[2 * i], &half, 2);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&bytes[2 * i], &high, 2);
    }
  }
  return bytes;
}

std::vector<float> decode(CudaType type, const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / (type == CudaType::kF32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == CudaType::kF32) {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    } else if (type == CudaType::kF16) {
      _Float16 half;
      std::memcpy(&half, &bytes[2 * i], 2);
      values[i] = static_cast<float>(half);
    } else {
      uint16_t high;
      std::memcpy(&high, &bytes[2 * i], 2);
      const uint32_t bits = static_cast<uint32_t>(high) << 16;
      std::memcpy(&values[i], &bits, 4);
    }
  }
  return values;
}

struct Case {
  std::vector<int> lengths;
  int heads = 2;
  int value_heads = 2;
  int key_dim = 128;
  int value_dim = 128;
  CudaType type = CudaType::kBf16;
  CudaType gate_type = CudaType::kBf16;
  KdaGate gate_kind = KdaGate::kSoftplus;
  float gate_offset = 0.0f;  // added to the raw gate: how fast it decays
  float steep = 0.0f;        // share of gates that are replaced by a huge decay
  bool initial = true;
  bool repeated_keys = false;
  float beta_offset = 0.0f;
  float beta_scale = 1.0f;
  bool varlen = true;
  CudaType state_type = CudaType::kF32;
  bool recurrent = false;  // kda_recurrent_cuda instead of the chunked form
  double tolerance = 5e-3;
};

struct Problem {
  Case settings;
  int64_t tokens = 0;
  int64_t chunks = 0;
  std::vector<int32_t> cu_seqlens;
  std::vector<float> q, k, v, gate, beta, a_log, dt_bias, state;
  std::vector<double> out, final, chunk_states;

  explicit Problem(const Case& c, int seed = 1) : settings(c) {
    std::mt19937 random(static_cast<unsigned>(seed));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t count, CudaType type, float scale, float offset) {
      x.resize(static_cast<size_t>(count));
      for (float& value : x) value = round_to(type, normal(random) * scale + offset);
    };
    cu_seqlens.push_back(0);
    for (const int n : c.lengths) {
      cu_seqlens.push_back(cu_seqlens.back() + n);
      chunks += (n + kKdaCudaChunk - 1) / kKdaCudaChunk;
    }
    tokens = cu_seqlens.back();
    const int64_t H = c.heads, HV = c.value_heads, K = c.key_dim, V = c.value_dim;
    fill(q, tokens * H * K, c.type, 1.0f, 0.0f);
    fill(k, tokens * H * K, c.type, 1.0f, 0.0f);
    fill(v, tokens * HV * V, c.type, 1.0f, 0.0f);
    fill(gate, tokens * HV * K, c.gate_type, 1.0f, c.gate_offset);
    fill(beta, tokens * HV, c.type, 1.0f, c.beta_offset);
    fill(a_log, HV, CudaType::kF32, 0.5f, 0.5f);
    fill(dt_bias, HV * K, CudaType::kF32, 0.5f, 0.0f);
    fill(state, static_cast<int64_t>(c.lengths.size()) * HV * V * K, c.state_type, 0.3f, 0.0f);
    if (c.repeated_keys) {
      for (int64_t t = 1; t < tokens; ++t) std::copy_n(k.begin(), H * K, k.begin() + t * H * K);
    }
    std::uniform_real_distribution<float> uniform;
    for (float& x : gate) {
      if (uniform(random) < c.steep) x = c.gate_kind == KdaGate::kNone ? -1000.0f : 1000.0f;
      if (c.gate_kind == KdaGate::kNone) x = -std::fabs(x);
    }
    if (!c.initial) std::fill(state.begin(), state.end(), 0.0f);
    reference();
  }

  double scale() const { return 1.0 / std::sqrt(static_cast<double>(settings.key_dim)); }

  void reference() {
    const int64_t H = settings.heads, HV = settings.value_heads, K = settings.key_dim, V = settings.value_dim;
    out.resize(v.size());
    final.assign(state.begin(), state.end());
    chunk_states.resize(static_cast<size_t>(chunks * HV * V * K));
    KdaParams params;
    params.key_dim = settings.key_dim;
    params.value_dim = settings.value_dim;
    params.gate_kind = settings.gate_kind;
    params.scale = static_cast<float>(scale());
    std::vector<std::thread> threads;
    int64_t first_chunk = 0;
    for (size_t n = 0; n < settings.lengths.size(); ++n) {
      const int length = settings.lengths[n];
      for (int64_t hv = 0; hv < HV; ++hv) {
        threads.emplace_back([=, this] {
          const int64_t h = hv / (HV / H);
          const int64_t begin = cu_seqlens[n];
          double* s = final.data() + (static_cast<int64_t>(n) * HV + hv) * V * K;
          const double a = settings.gate_kind == KdaGate::kNone ? 0.0 : a_log[static_cast<size_t>(hv)];
          std::vector<double> bias(dt_bias.begin() + hv * K, dt_bias.begin() + (hv + 1) * K);
          std::vector<double> qs(static_cast<size_t>(K)), ks = qs, gs = qs, vs(static_cast<size_t>(V)),
                                                          os = vs;
          for (int64_t t = 0; t < length; ++t) {
            if (t % kKdaCudaChunk == 0)
              std::copy_n(s, V * K,
                          chunk_states.begin() + ((first_chunk + t / kKdaCudaChunk) * HV + hv) * V * K);
            for (int64_t i = 0; i < K; ++i) {
              qs[static_cast<size_t>(i)] = q[static_cast<size_t>(((begin + t) * H + h) * K + i)];
              ks[static_cast<size_t>(i)] = k[static_cast<size_t>(((begin + t) * H + h) * K + i)];
              gs[static_cast<size_t>(i)] = gate[static_cast<size_t>(((begin + t) * HV + hv) * K + i)];
            }
            for (int64_t i = 0; i < V; ++i)
              vs[static_cast<size_t>(i)] = v[static_cast<size_t>(((begin + t) * HV + hv) * V + i)];
            const double logit = beta[static_cast<size_t>((begin + t) * HV + hv)];
            const double b = settings.beta_scale / (1.0 + std::exp(-logit));
            kda_reference<double>(params, 1, qs.data(), ks.data(), vs.data(), gs.data(), &b, a, bias.data(),
                                  s, os.data());
            std::copy_n(os.begin(), V, out.begin() + ((begin + t) * HV + hv) * V);
          }
        });
      }
      first_chunk += (length + kKdaCudaChunk - 1) / kKdaCudaChunk;
    }
    for (std::thread& thread : threads) thread.join();
  }
};

// Everything on the device; the state pool has two slots more than sequences, in another order.
struct Device {
  const Problem& problem;
  GpuArray<uint8_t> q, k, v, gate, beta, out, pool, chunk_states, workspace;
  GpuArray<float> a_log, dt_bias;
  GpuArray<int32_t> cu_seqlens, slots;
  std::vector<int32_t> slot_of;
  KdaCudaParams params;

  explicit Device(const Problem& p, KdaCudaPlan plan = KdaCudaPlan::kAuto)
      : problem(p),
        q(encode(p.settings.type, p.q)),
        k(encode(p.settings.type, p.k)),
        v(encode(p.settings.type, p.v)),
        gate(encode(p.settings.gate_type, p.gate)),
        beta(encode(p.settings.type, p.beta)),
        out(std::vector<uint8_t>(p.v.size() * static_cast<size_t>(cuda_size(p.settings.type)), 0xFF)),
        a_log(p.a_log),
        dt_bias(p.dt_bias),
        cu_seqlens(p.cu_seqlens) {
    const Case& c = p.settings;
    const int N = static_cast<int>(c.lengths.size());
    const int64_t size = static_cast<int64_t>(c.value_heads) * c.value_dim * c.key_dim;
    std::vector<float> values(static_cast<size_t>((N + 2) * size), 1e30f);
    for (int n = 0; n < N; ++n) {
      slot_of.push_back(N - n);
      std::copy_n(p.state.begin() + n * size, size, values.begin() + (N - n) * size);
    }
    pool = GpuArray<uint8_t>(encode(c.state_type, values));
    slots = GpuArray<int32_t>(slot_of);
    chunk_states = GpuArray<uint8_t>(p.chunk_states.size() * 4);
    params.heads = c.heads;
    params.value_heads = c.value_heads;
    params.key_dim = c.key_dim;
    params.value_dim = c.value_dim;
    params.sequences = N;
    params.tokens = p.tokens;
    params.cu_seqlens = c.varlen ? cu_seqlens.data() : nullptr;
    params.type = params.beta_type = c.type;
    params.gate_type = c.gate_type;
    params.q = {q.data(), static_cast<int64_t>(c.heads) * c.key_dim};
    params.k = {k.data(), static_cast<int64_t>(c.heads) * c.key_dim};
    params.v = {v.data(), static_cast<int64_t>(c.value_heads) * c.value_dim};
    params.gate = {gate.data(), static_cast<int64_t>(c.value_heads) * c.key_dim};
    params.beta = {beta.data(), c.value_heads};
    params.gate_kind = c.gate_kind;
    params.a_log = a_log.data();
    params.dt_bias = dt_bias.data();
    params.beta_is_logit = true;
    params.beta_scale = c.beta_scale;
    params.scale = static_cast<float>(p.scale());
    params.initial = {pool.data(), c.state_type, size, slots.data()};
    params.final = params.initial;
    params.chunk_states = chunk_states.data();
    params.chunk_state_type = CudaType::kF32;
    params.out = out.data();
    params.out_stride = static_cast<int64_t>(c.value_heads) * c.value_dim;
    params.plan = plan;
    if (!c.recurrent) workspace = GpuArray<uint8_t>(kda_chunk_cuda_workspace(params));
  }

  void run() {
    if (problem.settings.recurrent) {
      params.chunk_states = nullptr;
      return kda_recurrent_cuda(params, nullptr);
    }
    check_cuda(cudaMemset(workspace.data(), 0xFF, workspace.bytes()), "cudaMemset");
    check_cuda(cudaMemset(chunk_states.data(), 0xFF, chunk_states.bytes()), "cudaMemset");
    kda_chunk_cuda(params, workspace.data(), workspace.bytes(), nullptr);
  }
};

// Root of the mean square of the difference over that of the reference.
double error(const std::vector<double>& expected, const float* found) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = expected[i] - static_cast<double>(found[i]);
    difference += d * d;
    size += expected[i] * expected[i];
  }
  return size > 0.0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

// All plans; not kPipe where it needs more blocks at once than the device has room for.
std::vector<KdaCudaPlan> plans(const Case& c) {
  std::vector<KdaCudaPlan> all = {KdaCudaPlan::kFused, KdaCudaPlan::kTwoKernels, KdaCudaPlan::kSegments};
  const int scans = static_cast<int>(c.lengths.size()) * c.value_heads * (c.value_dim / 64);
  if (scans < cuda_device().multiprocessors) all.push_back(KdaCudaPlan::kPipe);
  return all;
}

void expect_agreement(const Problem& problem, const char* name, KdaCudaPlan plan) {
  SCOPED_TRACE(name);
  const Case& c = problem.settings;
  Device device(problem, plan);
  device.run();
  const std::vector<float> out = decode(c.type, device.out.host());
  const double out_error = error(problem.out, out.data());
  const std::vector<float> pool = decode(c.state_type, device.pool.host());
  const size_t size = static_cast<size_t>(c.value_heads * c.value_dim * c.key_dim);
  std::vector<float> final;
  for (const int32_t slot : device.slot_of)
    final.insert(final.end(), pool.begin() + static_cast<int64_t>(size) * slot,
                 pool.begin() + static_cast<int64_t>(size) * (slot + 1));
  const double state_error = error(problem.final, final.data());
  const std::vector<float> chunk_states = decode(CudaType::kF32, device.chunk_states.host());
  const double chunk_error = error(problem.chunk_states, chunk_states.data());
  std::printf("%-28s %s out %.2e  state %.2e  chunk states %.2e\n", name,
              plan == KdaCudaPlan::kFused      ? "fused"
              : plan == KdaCudaPlan::kSegments ? "segm "
              : plan == KdaCudaPlan::kPipe     ? "pipe "
                                               : "two  ",
              out_error, state_error, chunk_error);
  EXPECT_LT(out_error, c.tolerance);
  EXPECT_LT(state_error, c.tolerance);
  if (!c.recurrent) {
    EXPECT_LT(chunk_error, c.tolerance);
  }
  const float untouched = round_to(c.state_type, 1e30f);
  for (size_t i = 0; i < size; ++i) {
    ASSERT_EQ(pool[i], untouched);
    ASSERT_EQ(pool[pool.size() - 1 - i], untouched);
  }
}

void expect_agreement(const Case& c, const char* name, int seed = 1) {
  const Problem problem(c, seed);
  for (const KdaCudaPlan plan : plans(c)) expect_agreement(problem, name, plan);
}

class KdaCuda : public GpuTest {};

TEST_F(KdaCuda, TokenByToken) {
  // float32: the error grows with the length as rounding does, far below that of 16-bit operands.
  const Case c{.lengths = {1, 70, 0, 300},
               .heads = 2,
               .value_heads = 4,
               .type = CudaType::kF32,
               .gate_type = CudaType::kF32,
               .steep = 0.02f,
               .recurrent = true,
               .tolerance = 2e-6};
  const auto expect = [](const Case& settings, const char* name) {
    expect_agreement(Problem(settings), name, KdaCudaPlan::kAuto);
  };
  expect(c, "float32");
  Case other = c;
  other.key_dim = 60, other.value_dim = 100;
  expect(other, "60 x 100");
  other.key_dim = 256, other.value_dim = 256;
  expect(other, "256 x 256");
  other.key_dim = 33, other.value_dim = 17, other.gate_kind = KdaGate::kBounded;
  expect(other, "33 x 17, bounded");
  other = c, other.gate_kind = KdaGate::kNone, other.varlen = false, other.lengths = {50, 50};
  expect(other, "no gate, equal lengths");
  other = c, other.type = CudaType::kBf16, other.tolerance = 5e-3;
  expect(other, "bf16, float32 gate");
  other.type = other.gate_type = CudaType::kF16, other.state_type = CudaType::kBf16;
  expect(other, "fp16, bf16 state");
}

TEST_F(KdaCuda, SmallLengths) {
  for (const int length : {1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200})
    expect_agreement({.lengths = {length}}, ("length " + std::to_string(length)).c_str());
}

TEST_F(KdaCuda, SmallShapes) {
  expect_agreement({.lengths = {130}, .key_dim = 64, .value_dim = 64}, "64 x 64");
  expect_agreement({.lengths = {130}, .key_dim = 64}, "K 64, V 128");
  expect_agreement({.lengths = {130}, .value_dim = 64}, "K 128, V 64");
  expect_agreement({.lengths = {130}, .heads = 1, .value_heads = 3}, "1 head, 3 value heads");
  expect_agreement(
      {.lengths = {130}, .type = CudaType::kF16, .gate_type = CudaType::kF16, .tolerance = 2.5e-3}, "fp16");
  expect_agreement({.lengths = {130}, .gate_type = CudaType::kF32}, "fp32 gate");
  expect_agreement({.lengths = {130, 130}, .varlen = false}, "equal lengths");
  expect_agreement({.lengths = {130}, .state_type = CudaType::kBf16}, "bf16 state");
}

TEST_F(KdaCuda, SmallGates) {
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kBounded}, "bounded");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone}, "no gate");
  expect_agreement({.lengths = {200}, .gate_offset = -8.0f}, "slow decay");
  expect_agreement({.lengths = {200}, .gate_offset = 6.0f, .tolerance = 3.9e-3}, "fast decay");
  // Chunks that decay by 2^-100 to 2^-250: the ranges of kda_image_sm90.cuh.
  expect_agreement({.lengths = {200}, .gate_offset = 3.0f}, "decay around the first limit");
  expect_agreement({.lengths = {200}, .gate_offset = 5.0f}, "decay around the second limit");
  expect_agreement(
      {.lengths = {200}, .type = CudaType::kF16, .gate_type = CudaType::kF16, .gate_offset = 4.0f},
      "decay between the limits, fp16");
  expect_agreement({.lengths = {200}, .gate_offset = -4.0f, .steep = 0.3f}, "steep 0.3");
  expect_agreement({.lengths = {200}, .gate_offset = -4.0f, .steep = 0.05f}, "steep 0.05");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone, .steep = 0.9f}, "no gate, steep 0.9");
  expect_agreement({.lengths = {200}, .gate_kind = KdaGate::kNone, .steep = 1.0f}, "no gate, steep 1");
  expect_agreement({.lengths = {200},
                    .gate_offset = -12.0f,
                    .repeated_keys = true,
                    .beta_offset = 6.0f,
                    .tolerance = 1.2e-2},
                   "repeated keys");
  expect_agreement({.lengths = {200},
                    .gate_offset = -12.0f,
                    .repeated_keys = true,
                    .beta_offset = 6.0f,
                    .beta_scale = 2.0f,
                    .tolerance = 0.06},
                   "repeated keys, beta 2");
}

TEST_F(KdaCuda, VariableLengths) {
  expect_agreement({.lengths = {0, 15, 1, 0, 64, 200, 1, 300, 0}, .heads = 4, .value_heads = 4}, "varlen");
  expect_agreement({.lengths = {0, 0}}, "empty sequences");
  expect_agreement({.lengths = {300, 500, 20}, .heads = 48, .value_heads = 48}, "many heads");
}

TEST_F(KdaCuda, LongDecays) {
  expect_agreement({.lengths = {4096}, .heads = 4, .value_heads = 4, .gate_offset = -9.0f}, "4096 tokens");
  expect_agreement({.lengths = {3000, 0, 1000, 1}, .heads = 2, .value_heads = 2, .gate_offset = -9.0f},
                   "segments");
  expect_agreement({.lengths = {2048}, .heads = 70, .value_heads = 70, .gate_kind = KdaGate::kBounded},
                   "70 heads");
}

TEST_F(KdaCuda, SameBitsInEveryRun) {
  const Problem problem({.lengths = {500, 63, 200}, .heads = 8, .value_heads = 8, .steep = 0.02f});
  for (const KdaCudaPlan plan : plans(problem.settings)) {
    std::vector<uint8_t> first, first_pool;
    for (int i = 0; i < 100; ++i) {
      Device device(problem, plan);
      device.run();
      const std::vector<uint8_t> out = device.out.host(), pool = device.pool.host();
      if (i == 0) {
        first = out;
        first_pool = pool;
      }
      ASSERT_EQ(out, first) << "run " << i;
      ASSERT_EQ(pool, first_pool) << "run " << i;
    }
  }
}

TEST_F(KdaCuda, PipeHasTheBitsOfTwoKernels) {
  // Sequences longer than the ring of images (32 chunks), and some that are not.
  for (const bool small : {false, true}) {
    Case c{.lengths = {1300, 0, 547, 1, 2048}, .heads = 4, .value_heads = 8, .steep = 0.02f};
    if (small) c.key_dim = c.value_dim = 64;
    const Problem problem(c);
    Device two(problem, KdaCudaPlan::kTwoKernels), pipe(problem, KdaCudaPlan::kPipe);
    two.run();
    pipe.run();
    EXPECT_EQ(pipe.out.host(), two.out.host());
    EXPECT_EQ(pipe.pool.host(), two.pool.host());
    EXPECT_EQ(pipe.chunk_states.host(), two.chunk_states.host());
  }
}

TEST_F(KdaCuda, PipeInAGraph) {
  const Problem problem({.lengths = {700, 700}, .heads = 6, .value_heads = 6, .varlen = false});
  Device device(problem, KdaCudaPlan::kPipe);
  device.params.final.data = nullptr;  // every replay begins with the same states
  device.run();
  const std::vector<uint8_t> expected = device.out.host();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  kda_chunk_cuda(device.params, device.workspace.data(), device.workspace.bytes(), stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 5; ++i) {
    check_cuda(cudaMemsetAsync(device.out.data(), 0xFF, device.out.bytes(), stream), "cudaMemsetAsync");
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check_cuda(cudaStreamSynchronize(stream), "kda_chunk_cuda in a graph");
    EXPECT_EQ(device.out.host(), expected) << "replay " << i;
  }
  check_cuda(cudaGraphExecDestroy(executable), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  check_cuda(cudaStreamDestroy(stream), "stream");
}

TEST_F(KdaCuda, PipeThatDoesNotFitIsRefused) {
  const Problem problem({.lengths = {1}, .heads = 1, .value_heads = 1});
  Device device(problem, KdaCudaPlan::kPipe);
  device.params.sequences = cuda_device().multiprocessors;
  device.params.tokens = device.params.sequences;
  device.params.cu_seqlens = nullptr;
  GpuArray<uint8_t> workspace(kda_chunk_cuda_workspace(device.params));
  EXPECT_THROW(kda_chunk_cuda(device.params, workspace.data(), workspace.bytes(), nullptr), Error);
}

TEST_F(KdaCuda, SequenceAloneAndSplit) {
  // A sequence in a batch has the bits of the sequence alone, and of its two halves (at a chunk's end) after
  // another.
  const Problem both({.lengths = {192, 320}, .heads = 4, .value_heads = 4});
  Device batch(both);
  batch.run();
  const std::vector<uint8_t> out = batch.out.host();
  Device parts(both);
  const size_t row = 4 * 128;
  for (const auto& [begin, end, slot] :
       {std::tuple{192, 320, 1}, std::tuple{320, 512, 1}, std::tuple{0, 192, 2}}) {
    KdaCudaParams p = parts.params;
    p.sequences = 1;
    p.tokens = end - begin;
    p.cu_seqlens = nullptr;
    const auto shift = [&](CudaTokens& x) {
      x.data = static_cast<const uint8_t*>(x.data) + begin * x.stride * 2;
    };
    shift(p.q);
    shift(p.k);
    shift(p.v);
    shift(p.gate);
    shift(p.beta);
    p.out = parts.out.data() + static_cast<size_t>(begin) * row * 2;
    GpuArray<int32_t> slots(std::vector<int32_t>{slot});
    p.initial.slots = p.final.slots = slots.data();
    p.chunk_states = nullptr;
    kda_chunk_cuda(p, parts.workspace.data(), parts.workspace.bytes(), nullptr);
    check_cuda(cudaDeviceSynchronize(), "kda_chunk_cuda");
  }
  EXPECT_EQ(parts.out.host(), out);
  EXPECT_EQ(parts.pool.host(), batch.pool.host());
}

TEST_F(KdaCuda, NegativeSlotsAreZeroAndKept) {
  Case c{.lengths = {70, 70}, .initial = false};
  const Problem problem(c);
  Device device(problem);
  const std::vector<uint8_t> before = device.pool.host();
  GpuArray<int32_t> none(std::vector<int32_t>{-1, -1});
  device.params.initial.slots = device.params.final.slots = none.data();
  device.run();
  EXPECT_LT(error(problem.out, decode(c.type, device.out.host()).data()), c.tolerance);
  EXPECT_EQ(device.pool.host(), before);
}

TEST(KdaCudaArguments, AreChecked) {
  KdaCudaParams p;
  p.heads = p.value_heads = 1;
  p.key_dim = p.value_dim = 128;
  EXPECT_NO_THROW(validate(p));
  KdaCudaParams bad = p;
  bad.key_dim = 96;
  EXPECT_THROW(validate(bad), Error);
  bad = p;
  bad.heads = 2;
  EXPECT_THROW(validate(bad), Error);
  bad = p;
  bad.sequences = 3;
  bad.tokens = 100;
  EXPECT_THROW(validate(bad), Error);
}

}  // namespace
}  // namespace kilin
