// SPDX-License-Identifier: Apache-2.0
// Test support: a KDA problem with its memory, the oracle on it in double, and comparisons by relative norm.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "kernels/kda/kda.h"
#include "kernels/kda/kda_reference.h"

namespace kilin::kda_testing {

using KdaFunction = void (*)(const KdaParams&, ThreadPool&);

struct Shape {
  int heads = 1;
  int value_heads = 1;
  int key_dim = 32;
  int value_dim = 32;
  std::vector<int> lengths{1};
  KdaGate gate = KdaGate::kSoftplus;
  bool scalar_gate = false;
  bool l2norm = true;
  bool beta_is_logit = true;
  int padding = 0;  // floats between the rows of every tensor
  double state_size = 1.0;
};

// All arrays of a problem, filled with random numbers; params() points into them. Slots are in reverse order
// with an unused one between any two.
struct Problem {
  Shape shape;
  std::vector<int32_t> cu_seqlens{0};
  std::vector<int32_t> slots;
  std::vector<float> q, k, v, gate, beta, a_log, dt_bias, state, out;

  explicit Problem(const Shape& wanted, uint64_t seed = 1) : shape(wanted) {
    Random random(seed);
    for (int length : shape.lengths) {
      slots.push_back(2 * static_cast<int32_t>(shape.lengths.size() - slots.size()) - 1);
      cu_seqlens.push_back(cu_seqlens.back() + length);
    }
    const auto fill = [&](std::vector<float>& to, int64_t count, double mean, double deviation) {
      to.resize(static_cast<size_t>(count));
      for (float& x : to) x = static_cast<float>(mean + deviation * random.normal());
    };
    const int64_t tokens = cu_seqlens.back();
    fill(q, tokens * key_stride(), 0.0, 1.0);
    fill(k, tokens * key_stride(), 0.0, 1.0);
    fill(v, tokens * value_stride(), 0.0, 1.0);
    fill(gate, tokens * gate_stride(), -1.0, 2.0);
    fill(beta, tokens * beta_stride(), 0.0, 1.0);
    fill(a_log, shape.value_heads, 0.5, 1.0);
    fill(dt_bias, gate_channels(), -1.0, 1.0);
    fill(state, slot_stride() * (2 * static_cast<int64_t>(slots.size()) + 1), 0.0, shape.state_size);
    out.assign(static_cast<size_t>(tokens * value_stride()), 0.0f);
    if (!shape.beta_is_logit)
      std::for_each(beta.begin(), beta.end(), [](float& b) { b = std::abs(std::sin(b)); });
    if (shape.gate == KdaGate::kNone)
      std::for_each(gate.begin(), gate.end(), [](float& g) { g = -std::abs(g); });
  }

  int64_t gate_channels() const {
    return shape.scalar_gate ? shape.value_heads : shape.value_heads * shape.key_dim;
  }
  int64_t key_stride() const { return shape.heads * shape.key_dim + shape.padding; }
  int64_t value_stride() const { return shape.value_heads * shape.value_dim + shape.padding; }
  int64_t gate_stride() const { return gate_channels() + shape.padding; }
  int64_t beta_stride() const { return shape.value_heads + shape.padding; }
  int64_t slot_stride() const { return shape.value_heads * shape.value_dim * shape.key_dim + shape.padding; }

  KdaParams params() {
    KdaParams p;
    p.heads = shape.heads, p.value_heads = shape.value_heads;
    p.key_dim = shape.key_dim, p.value_dim = shape.value_dim;
    p.sequences = static_cast<int>(slots.size());
    p.cu_seqlens = cu_seqlens.data(), p.slots = slots.data();
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.gate = gate.data(), p.beta = beta.data();
    p.q_stride = p.k_stride = key_stride();
    p.v_stride = p.out_stride = value_stride();
    p.gate_stride = gate_stride(), p.beta_stride = beta_stride(), p.slot_stride = slot_stride();
    p.gate_kind = shape.gate, p.scalar_gate = shape.scalar_gate;
    p.a_log = a_log.data(), p.dt_bias = dt_bias.data();
    p.l2norm = shape.l2norm, p.beta_is_logit = shape.beta_is_logit;
    p.scale = static_cast<float>(1.0 / std::sqrt(shape.key_dim));
    p.state = state.data(), p.out = out.data();
    return p;
  }
};

struct Result {
  std::vector<float> out;
  std::vector<float> state;
};

// The state and output of a run on a copy: the problem itself stays as it is.
inline Result run(const Problem& problem, KdaFunction function, int threads = 1) {
  Problem copy = problem;
  ThreadPool pool(threads);
  function(copy.params(), pool);
  return {std::move(copy.out), std::move(copy.state)};
}

// What the double oracle says, one entry per (sequence, value head): out [tokens][V], state [V][K].
struct Expected {
  std::vector<double> out;
  std::vector<double> state;
};

inline std::vector<Expected> oracle(Problem problem) {
  const KdaParams p = problem.params();
  const int64_t K = p.key_dim;
  const int64_t V = p.value_dim;
  const int64_t channels = p.scalar_gate ? 1 : K;
  std::vector<Expected> all;
  for (int n = 0; n < p.sequences; ++n) {
    const int64_t first = p.cu_seqlens[n];
    const int64_t tokens = p.cu_seqlens[n + 1] - first;
    const auto rows = [&](const float* from, int64_t stride, int64_t column, int64_t width) {
      std::vector<double> to;
      for (int64_t t = first; t < first + tokens; ++t) {
        to.insert(to.end(), from + t * stride + column, from + t * stride + column + width);
      }
      return to;
    };
    for (int64_t hv = 0; hv < p.value_heads; ++hv) {
      const int64_t h = hv / (p.value_heads / p.heads);
      const std::vector<double> bias(p.dt_bias + hv * channels, p.dt_bias + (hv + 1) * channels);
      const float* state = p.state + p.slots[n] * p.slot_stride + hv * V * K;
      Expected e{std::vector<double>(static_cast<size_t>(tokens * V)),
                 std::vector<double>(state, state + V * K)};
      kda_reference<double>(p, static_cast<int>(tokens), rows(p.q, p.q_stride, h * K, K).data(),
                            rows(p.k, p.k_stride, h * K, K).data(), rows(p.v, p.v_stride, hv * V, V).data(),
                            rows(p.gate, p.gate_stride, hv * channels, channels).data(),
                            rows(p.beta, p.beta_stride, hv, 1).data(), static_cast<double>(p.a_log[hv]),
                            bias.data(), e.state.data(), e.out.data());
      all.push_back(std::move(e));
    }
  }
  return all;
}

// |found - expected| / |expected|, NaN counts as infinite; 0 for two empty or all-zero arrays
template <class A, class B>
double relative_error(const A& found, const B& expected) {
  double difference = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    difference += d * d;
    norm += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  if (difference == 0.0) return 0.0;
  return std::isfinite(difference) ? std::sqrt(difference / (norm + 1e-60)) : HUGE_VAL;
}

// Largest relative error over all sequences and heads, of outputs and of final states.
inline double worst_error(Problem problem, const Result& result, const std::vector<Expected>& expected) {
  const KdaParams p = problem.params();
  double worst = 0.0;
  for (int n = 0; n < p.sequences; ++n) {
    for (int64_t hv = 0; hv < p.value_heads; ++hv) {
      const Expected& e = expected[static_cast<size_t>(n * p.value_heads + hv)];
      std::vector<float> out;
      for (int64_t t = p.cu_seqlens[n]; t < p.cu_seqlens[n + 1]; ++t) {
        const float* row = result.out.data() + t * p.out_stride + hv * p.value_dim;
        out.insert(out.end(), row, row + p.value_dim);
      }
      const int64_t size = static_cast<int64_t>(p.value_dim) * p.key_dim;
      const float* state = result.state.data() + p.slots[n] * p.slot_stride + hv * size;
      worst = std::max(worst, relative_error(out, e.out));
      worst = std::max(worst, relative_error(std::vector<float>(state, state + size), e.state));
    }
  }
  return worst;
}

// Calls body(name of the instruction set) with each one in force.
inline void for_each_isa(const std::function<void(const std::string&)>& body) {
  const Isa before = active_isa();
  for (Isa isa : supported_isas()) {
    set_isa(isa);
    body(std::string(isa_name(isa)));
  }
  set_isa(before);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace kilin::kda_testing
