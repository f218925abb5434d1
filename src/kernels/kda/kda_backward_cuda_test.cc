// SPDX-License-Identifier: Apache-2.0
// Gradients on the GPU against the adjoint of the recurrence in double precision (kda_backward_reference.h),
// and against themselves. Tolerances are those of flash-linear-attention's tests (norm of the difference over
// the norm).
#include "kernels/kda/kda_backward_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda/gpu_test.h"
#include "kernels/kda/kda_backward_reference.h"

namespace kilin {
namespace {

TypedArray filled(CudaType type, int64_t count, const std::function<float()>& next) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = static_cast<double>(next());
  return {type, values};
}

struct Case {
  std::vector<int> lengths;
  int heads = 2;
  int value_heads = 2;
  int dim = 128;
  CudaType type = CudaType::kBf16;
  CudaType gate_type = CudaType::kBf16;
  CudaType beta_type = CudaType::kBf16;
  KdaGate gate = KdaGate::kSoftplus;
  float gate_offset = 0.0f;
  double steep = 0.0;   // share of tokens and channels that forget all
  double at_cut = 0.0;  // share whose decay is 2^-24, where the kernels cut it, give or take 2^0.1 (kNone)
  bool logits = true;
  bool l2norm = true;
  bool varlen = true;
  bool repeated_keys = false;
  double slack = 1.0;  // times the tolerances
};

struct Outputs {
  TypedArray q, k, v, gate, beta, a_log, dt_bias, state;
};

struct Problem {
  Case c;
  int64_t tokens = 0;
  std::vector<int32_t> cu_seqlens{0};
  GpuArray<int32_t> offsets;
  TypedArray q, k, v, gate, beta, a_log, dt_bias, state, d_out, d_state;

  explicit Problem(const Case& wanted) : c(wanted) {
    for (int n : c.lengths) cu_seqlens.push_back(cu_seqlens.back() + n);
    tokens = cu_seqlens.back();
    offsets = GpuArray<int32_t>(cu_seqlens);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    const auto values = [&](float mean, float deviation) {
      return [&, mean, deviation] { return mean + deviation * normal(random); };
    };
    const int64_t K = c.dim;
    const float key_size = c.l2norm ? 1.0f : 1.0f / std::sqrt(static_cast<float>(K));
    const std::vector<float> first = [&] {
      std::vector<float> x(static_cast<size_t>(c.heads * K));
      for (float& y : x) y = normal(random);
      return x;
    }();
    size_t index = 0;
    q = filled(c.type, tokens * c.heads * K, values(0.0f, key_size));
    k = filled(c.type, tokens * c.heads * K,
               [&] { return c.repeated_keys ? first[index++ % first.size()] : key_size * normal(random); });
    v = filled(c.type, tokens * c.value_heads * K, values(0.0f, 1.0f));
    gate = filled(c.gate_type, tokens * c.value_heads * K, [&] {
      float x = c.gate_offset + normal(random);
      if (c.gate == KdaGate::kNone) x = -std::fabs(0.1f * x);
      if (uniform(random) < c.steep) x = c.gate == KdaGate::kNone ? -1000.0f : 1000.0f;
      if (uniform(random) < c.at_cut) x = static_cast<float>((-24.1 + 0.2 * uniform(random)) * std::log(2.0));
      return x;
    });
    int turn = 0;
    beta = filled(c.beta_type, tokens * c.value_heads, [&] {
      const float x = normal(random);
      if (c.logits) return x;
      return turn++ % 7 == 3 ? 0.0f : std::fabs(std::sin(x));
    });
    a_log = filled(CudaType::kF32, c.value_heads, values(0.3f, 0.5f));
    dt_bias = filled(CudaType::kF32, c.value_heads * K, values(-1.0f, 0.5f));
    const auto states = static_cast<int64_t>(c.lengths.size()) * c.value_heads * K * K;
    state = filled(CudaType::kF32, states, values(0.0f, 0.3f));
    d_out = filled(c.type, tokens * c.value_heads * K, values(0.0f, 1.0f));
    d_state = filled(CudaType::kF32, states, values(0.0f, 0.3f));
  }

  KdaBackwardCudaParams params(Outputs& to) const {
    const int64_t H = c.heads, HV = c.value_heads, K = c.dim;
    const auto nothing = [] { return std::nanf(""); };  // what is not written shows
    to.q = filled(c.type, tokens * H * K, nothing);
    to.k = filled(c.type, tokens * H * K, nothing);
    to.v = filled(c.type, tokens * HV * K, nothing);
    to.gate = filled(c.gate_type, tokens * HV * K, nothing);
    to.beta = filled(c.beta_type, tokens * HV, nothing);
    to.a_log = filled(CudaType::kF32, HV, nothing);
    to.dt_bias = filled(CudaType::kF32, HV * K, nothing);
    to.state = filled(CudaType::kF32, static_cast<int64_t>(state.values().size()), nothing);
    KdaBackwardCudaParams p;
    KdaCudaParams& f = p.forward;
    f.heads = c.heads;
    f.value_heads = c.value_heads;
    f.key_dim = f.value_dim = c.dim;
    f.sequences = static_cast<int>(c.lengths.size());
    f.tokens = tokens;
    f.cu_seqlens = c.varlen ? offsets.data() : nullptr;
    f.type = c.type;
    f.q = {q.data(), H * K};
    f.k = {k.data(), H * K};
    f.v = {v.data(), HV * K};
    f.gate = {gate.data(), HV * K};
    f.gate_type = c.gate_type;
    f.beta = {beta.data(), HV};
    f.beta_type = c.beta_type;
    f.gate_kind = c.gate;
    const bool raw = c.gate == KdaGate::kNone;
    f.a_log = raw ? nullptr : reinterpret_cast<const float*>(a_log.data());
    f.dt_bias = raw ? nullptr : reinterpret_cast<const float*>(dt_bias.data());
    f.l2norm = c.l2norm;
    f.beta_is_logit = c.logits;
    f.scale = 1.0f / std::sqrt(static_cast<float>(K));
    f.initial = {state.data(), CudaType::kF32, HV * K * K, nullptr};
    p.d_out = {d_out.data(), HV * K};
    p.d_final = {d_state.data(), CudaType::kF32, HV * K * K, nullptr};
    p.d_initial = {to.state.data(), CudaType::kF32, HV * K * K, nullptr};
    p.d_q = {to.q.data(), H * K};
    p.d_k = {to.k.data(), H * K};
    p.d_v = {to.v.data(), HV * K};
    p.d_gate = {to.gate.data(), HV * K};
    p.d_beta = {to.beta.data(), HV};
    if (!raw) {
      p.d_a_log = reinterpret_cast<float*>(to.a_log.data());
      p.d_dt_bias = reinterpret_cast<float*>(to.dt_bias.data());
    }
    return p;
  }

  void run(Outputs& to) const {
    const KdaBackwardCudaParams p = params(to);
    const size_t bytes = kda_backward_cuda_workspace(p);
    const GpuArray<uint8_t> workspace(std::vector<uint8_t>(bytes, 0xFF));  // NaN in every type
    kda_backward_cuda(p, workspace.data(), bytes, nullptr);
    check_cuda(cudaDeviceSynchronize(), "kda_backward_cuda");
  }
};

struct Expected {
  std::vector<double> q, k, v, gate, beta, a_log, dt_bias, state;
};

Expected oracle(const Problem& problem) {
  const Case& c = problem.c;
  const int64_t H = c.heads, HV = c.value_heads, K = c.dim;
  KdaParams p;
  p.key_dim = p.value_dim = c.dim;
  p.gate_kind = c.gate;
  p.l2norm = c.l2norm;
  p.beta_is_logit = c.logits;
  p.scale = 1.0f / std::sqrt(static_cast<float>(K));
  const size_t pairs = c.lengths.size() * static_cast<size_t>(HV);
  std::vector<KdaReferenceGradients> all(pairs);
  const auto slice = [&](const TypedArray& x, size_t n, int64_t stride, int64_t column, int64_t width) {
    std::vector<double> to;
    for (int64_t t = problem.cu_seqlens[n]; t < problem.cu_seqlens[n + 1]; ++t) {
      const auto row = x.values().begin() + t * stride + column;
      to.insert(to.end(), row, row + width);
    }
    return to;
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < pairs; ++i) {
    threads.emplace_back([&, i] {
      const size_t n = i / static_cast<size_t>(HV);
      const auto hv = static_cast<int64_t>(i % static_cast<size_t>(HV));
      const int64_t h = hv / (HV / H);
      const auto state = static_cast<int64_t>(i) * K * K;
      all[i] = kda_backward_reference(
          p, c.lengths[n], slice(problem.q, n, H * K, h * K, K).data(),
          slice(problem.k, n, H * K, h * K, K).data(), slice(problem.v, n, HV * K, hv * K, K).data(),
          slice(problem.gate, n, HV * K, hv * K, K).data(), slice(problem.beta, n, HV, hv, 1).data(),
          problem.a_log.values()[static_cast<size_t>(hv)], problem.dt_bias.values().data() + hv * K,
          problem.state.values().data() + state, slice(problem.d_out, n, HV * K, hv * K, K).data(),
          problem.d_state.values().data() + state);
    });
    if (threads.size() == 16 || i + 1 == pairs) {
      for (std::thread& thread : threads) thread.join();
      threads.clear();
    }
  }
  Expected e;
  e.q.resize(problem.q.values().size()), e.k.resize(problem.k.values().size()),
      e.v.resize(problem.v.values().size());
  e.gate.resize(problem.gate.values().size()), e.beta.resize(problem.beta.values().size());
  e.a_log.resize(static_cast<size_t>(HV)), e.dt_bias.resize(static_cast<size_t>(HV * K));
  for (size_t i = 0; i < pairs; ++i) {
    const size_t n = i / static_cast<size_t>(HV);
    const auto hv = static_cast<int64_t>(i % static_cast<size_t>(HV));
    const int64_t h = hv / (HV / H);
    const auto put = [&](std::vector<double>& to, const std::vector<double>& from, int64_t stride,
                         int64_t column, int64_t width) {
      for (int64_t j = 0; j < static_cast<int64_t>(from.size()); ++j)
        to[static_cast<size_t>((problem.cu_seqlens[n] + j / width) * stride + column + j % width)] +=
            from[static_cast<size_t>(j)];
    };
    put(e.q, all[i].q, H * K, h * K, K);
    put(e.k, all[i].k, H * K, h * K, K);
    put(e.v, all[i].v, HV * K, hv * K, K);
    put(e.gate, all[i].gate, HV * K, hv * K, K);
    put(e.beta, all[i].beta, HV, hv, 1);
    e.state.insert(e.state.end(), all[i].state.begin(), all[i].state.end());
    if (c.gate == KdaGate::kNone) continue;
    e.a_log[static_cast<size_t>(hv)] += all[i].a_log;
    for (int64_t d = 0; d < K; ++d)
      e.dt_bias[static_cast<size_t>(hv * K + d)] += all[i].dt_bias[static_cast<size_t>(d)];
  }
  return e;
}

// Prints the relative error and where it is worst when it is above the tolerance.
void compare(const char* what, const char* name, const TypedArray& found, const std::vector<double>& expected,
             double tolerance, std::string& line) {
  const std::vector<double> x = found.now();
  ASSERT_EQ(x.size(), expected.size());
  double difference = 0.0, norm = 0.0, worst = -1.0;
  size_t place = 0, bad = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = x[i] - expected[i];
    difference += d * d;
    norm += expected[i] * expected[i];
    bad += std::isfinite(x[i]) ? 0 : 1;
    if (!(std::fabs(d) <= worst)) {
      worst = std::fabs(d);
      place = i;
    }
  }
  const double error = std::sqrt(difference / (norm + 1e-30));
  char text[64];
  std::snprintf(text, sizeof text, " %s %.5f", name, error);
  line += text;
  if (x.empty()) return;
  EXPECT_LT(error, tolerance) << what << " d_" << name << ": " << bad << " not finite; worst at " << place
                              << " of " << x.size() << ": " << x[place] << ", expected " << expected[place];
}

class KdaBackwardCuda : public GpuTest {
 protected:
  static void expect_oracle(const Case& c, const char* what) {
    const Problem problem(c);
    Outputs found;
    problem.run(found);
    const Expected expected = oracle(problem);
    std::string line = std::string("errors of ") + what + ":";
    compare(what, "q", found.q, expected.q, 0.008 * c.slack, line);
    compare(what, "k", found.k, expected.k, 0.008 * c.slack, line);
    compare(what, "v", found.v, expected.v, 0.008 * c.slack, line);
    compare(what, "gate", found.gate, expected.gate, 0.02 * c.slack, line);
    compare(what, "beta", found.beta, expected.beta, 0.02 * c.slack, line);
    compare(what, "state", found.state, expected.state, 0.008 * c.slack, line);
    if (c.gate != KdaGate::kNone) {
      compare(what, "a_log", found.a_log, expected.a_log, 0.02 * c.slack, line);
      compare(what, "dt_bias", found.dt_bias, expected.dt_bias, 0.008 * c.slack, line);
    }
    std::printf("%s\n", line.c_str());
  }
};

TEST_F(KdaBackwardCuda, OneChunkFollowsTheOracle) {
  expect_oracle({.lengths = {64}, .heads = 1, .value_heads = 1}, "one");
}

TEST_F(KdaBackwardCuda, SequencesOfEveryLengthFollowTheOracle) {
  expect_oracle({.lengths = {0, 1, 15, 16, 17, 63, 64, 65, 200, 0, 128}}, "128");
  expect_oracle({.lengths = {0, 1, 15, 16, 17, 63, 64, 65, 200, 0, 128}, .dim = 64}, "64");
}

TEST_F(KdaBackwardCuda, EveryGateFollowsTheOracle) {
  expect_oracle({.lengths = {150, 70}, .gate = KdaGate::kBounded}, "bounded");
  expect_oracle({.lengths = {150, 70}, .gate = KdaGate::kNone}, "no gate");
  expect_oracle({.lengths = {150, 70}, .gate_offset = -4.0f}, "slow");
  expect_oracle({.lengths = {150, 70}, .gate_offset = 3.0f}, "fast");
}

TEST_F(KdaBackwardCuda, TotalForgettingFollowsTheOracle) {
  for (const double share : {0.02, 0.3, 0.9}) {
    expect_oracle({.lengths = {150, 70}, .gate = KdaGate::kNone, .steep = share}, "steep, no gate");
    expect_oracle({.lengths = {150, 70}, .dim = 64, .gate_offset = -3.0f, .steep = share}, "steep softplus");
    expect_oracle(
        {.lengths = {150, 70}, .gate_type = CudaType::kF32, .gate = KdaGate::kNone, .at_cut = share},
        "decays around the cut");
  }
}

TEST_F(KdaBackwardCuda, OtherTypesFollowTheOracle) {
  expect_oracle(
      {.lengths = {130}, .type = CudaType::kF16, .gate_type = CudaType::kF16, .beta_type = CudaType::kF16},
      "fp16");
  expect_oracle({.lengths = {130}, .gate_type = CudaType::kF32, .beta_type = CudaType::kF32}, "fp32 gate");
}

TEST_F(KdaBackwardCuda, PlainBetaMayBeZero) {
  expect_oracle({.lengths = {130}, .beta_type = CudaType::kF32, .logits = false, .l2norm = false},
                "plain beta");
}

TEST_F(KdaBackwardCuda, GradientsOfSharedHeadsAreSummed) {
  expect_oracle({.lengths = {130, 64}, .heads = 2, .value_heads = 6}, "GVA x 3");
}

TEST_F(KdaBackwardCuda, SequencesOfOneLengthNeedNoTable) {
  expect_oracle({.lengths = {100, 100, 100}, .varlen = false}, "no table");
}

TEST_F(KdaBackwardCuda, RepeatedKeysStayStable) {
  // every token corrects what the one before it wrote: rounding to 16 bits shows most in dv
  expect_oracle({.lengths = {200}, .gate_offset = -5.0f, .repeated_keys = true, .slack = 3.0},
                "repeated keys");
}

TEST_F(KdaBackwardCuda, LongSequencesFollowTheOracle) {
  expect_oracle({.lengths = {2000}, .heads = 1, .value_heads = 1, .gate_offset = -3.0f}, "2000");
}

TEST_F(KdaBackwardCuda, TheSameInputsGiveTheSameBits) {
  const Problem problem({.lengths = {700, 65, 300}, .heads = 4, .value_heads = 8});
  Outputs first, second;
  problem.run(first);
  for (int i = 0; i < 5; ++i) {
    problem.run(second);
    EXPECT_EQ(first.q.bytes(), second.q.bytes());
    EXPECT_EQ(first.k.bytes(), second.k.bytes());
    EXPECT_EQ(first.v.bytes(), second.v.bytes());
    EXPECT_EQ(first.gate.bytes(), second.gate.bytes());
    EXPECT_EQ(first.beta.bytes(), second.beta.bytes());
    EXPECT_EQ(first.a_log.bytes(), second.a_log.bytes());
    EXPECT_EQ(first.dt_bias.bytes(), second.dt_bias.bytes());
    EXPECT_EQ(first.state.bytes(), second.state.bytes());
  }
}

}  // namespace
}  // namespace kilin
