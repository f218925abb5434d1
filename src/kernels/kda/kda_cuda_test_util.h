// SPDX-License-Identifier: Apache-2.0
// Tests of the chunked form on the GPU: problems with their results by the recurrence in double precision
// (kda_reference.h), and their arrays on the device.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/float16.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/gpu_test.h"
#include "kernels/kda/kda_cuda.h"
#include "kernels/kda/kda_recurrent_cuda.h"
#include "kernels/kda/kda_reference.h"

namespace kilin::kda_cuda_testing {

inline float round_to(CudaType type, float x) {
  if (type == CudaType::kF32) return x;
  return type == CudaType::kF16 ? to_float(to_float16(x)) : to_float(to_bfloat16(x));
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
inline double error(const std::vector<double>& expected, const float* found) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = expected[i] - static_cast<double>(found[i]);
    difference += d * d;
    size += expected[i] * expected[i];
  }
  return size > 0.0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

// All plans; not kPipe where it needs more blocks at once than the device has room for.
inline std::vector<KdaCudaPlan> plans(const Case& c) {
  std::vector<KdaCudaPlan> all = {KdaCudaPlan::kFused, KdaCudaPlan::kTwoKernels, KdaCudaPlan::kSegments};
  const int scans = static_cast<int>(c.lengths.size()) * c.value_heads * (c.value_dim / 64);
  if (scans < cuda_device().multiprocessors) all.push_back(KdaCudaPlan::kPipe);
  return all;
}

inline void expect_agreement(const Problem& problem, const char* name, KdaCudaPlan plan) {
  SCOPED_TRACE(name);
  const Case& c = problem.settings;
  Device device(problem, plan);
  device.run();
  const std::vector<float> out = decode<float>(c.type, device.out.host());
  const double out_error = error(problem.out, out.data());
  const std::vector<float> pool = decode<float>(c.state_type, device.pool.host());
  const size_t size = static_cast<size_t>(c.value_heads) * static_cast<size_t>(c.value_dim * c.key_dim);
  std::vector<float> final;
  for (const int32_t slot : device.slot_of)
    final.insert(final.end(), pool.begin() + static_cast<int64_t>(size) * slot,
                 pool.begin() + static_cast<int64_t>(size) * (slot + 1));
  const double state_error = error(problem.final, final.data());
  const std::vector<float> chunk_states = decode<float>(CudaType::kF32, device.chunk_states.host());
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

inline void expect_agreement(const Case& c, const char* name, int seed = 1) {
  const Problem problem(c, seed);
  for (const KdaCudaPlan plan : plans(c)) expect_agreement(problem, name, plan);
}

class KdaCuda : public GpuTest {};

}  // namespace kilin::kda_cuda_testing
