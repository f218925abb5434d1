// SPDX-License-Identifier: Apache-2.0
// Test support: a KDA problem with gradients of its outputs, kda_backward() and the oracle on it, and the
// comparison of both.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "kernels/kda/kda_backward.h"
#include "kernels/kda/kda_backward_reference.h"
#include "kernels/kda/kda_test_util.h"

namespace kilin::kda_testing {

template <class T>
struct Gradients {
  std::vector<T> q, k, v, gate, beta, a_log, dt_bias, state;

  // (name, member) of each of them
  template <class Body>
  void for_each(const Gradients<float>& other, Body body) const {
    body("q", q, other.q);
    body("k", k, other.k);
    body("v", v, other.v);
    body("gate", gate, other.gate);
    body("beta", beta, other.beta);
    body("a_log", a_log, other.a_log);
    body("dt_bias", dt_bias, other.dt_bias);
    body("state", state, other.state);
  }
};

// A problem and the gradients of its outputs and final states, which lie like out and state.
struct BackwardProblem : Problem {
  std::vector<float> d_out, d_state;
  int64_t memory_per_thread = KdaBackwardParams{}.memory_per_thread;

  explicit BackwardProblem(const Shape& wanted, uint64_t seed = 1)
      : BackwardProblem(Problem(wanted, seed), seed) {}
  explicit BackwardProblem(const Problem& problem, uint64_t seed = 1) : Problem(problem) {
    Random random(seed + 1000);
    d_out.resize(out.size());
    d_state.resize(state.size());
    for (float& x : d_out) x = static_cast<float>(random.normal());
    for (float& x : d_state) x = static_cast<float>(random.normal());
  }
};

inline KdaBackwardParams backward_params(BackwardProblem& problem, Gradients<float>& to) {
  KdaBackwardParams p;
  p.forward = problem.params();
  p.forward.out = nullptr;
  p.d_out = problem.d_out.data();
  p.d_out_stride = p.forward.v_stride;
  p.d_state = to.state.data();
  p.d_slot_stride = p.forward.slot_stride;
  p.d_q = to.q.data(), p.d_k = to.k.data(), p.d_v = to.v.data();
  p.d_gate = to.gate.data(), p.d_beta = to.beta.data();
  p.d_q_stride = p.d_k_stride = p.forward.q_stride;
  p.d_v_stride = p.forward.v_stride;
  p.d_gate_stride = p.forward.gate_stride;
  p.d_beta_stride = p.forward.beta_stride;
  if (problem.shape.gate != KdaGate::kNone) p.d_a_log = to.a_log.data(), p.d_dt_bias = to.dt_bias.data();
  p.memory_per_thread = problem.memory_per_thread;
  return p;
}

inline constexpr float kUntouched = 12345.0f;

inline Gradients<float> empty_gradients(const BackwardProblem& problem) {
  Gradients<float> to;
  const auto fill = [](std::vector<float>& x, size_t size) { x.assign(size, kUntouched); };
  fill(to.q, problem.q.size()), fill(to.k, problem.k.size()), fill(to.v, problem.v.size());
  fill(to.gate, problem.gate.size()), fill(to.beta, problem.beta.size());
  fill(to.a_log, problem.a_log.size()), fill(to.dt_bias, problem.dt_bias.size());
  to.state = problem.d_state;
  return to;
}

inline Gradients<float> run_backward(const BackwardProblem& problem, int threads = 1) {
  BackwardProblem copy = problem;
  Gradients<float> to = empty_gradients(problem);
  ThreadPool pool(threads);
  kda_backward(backward_params(copy, to), pool);
  return to;
}

// One (sequence, value head) of a problem in double, as kda_reference() wants it
struct HeadInputs {
  std::vector<double> q, k, v, gate, beta, dt_bias, state, d_out, d_state;
  double a_log = 0.0;
  int tokens = 0;
};

inline HeadInputs head_inputs(BackwardProblem& problem, int sequence, int hv) {
  const KdaParams p = problem.params();
  const int64_t K = p.key_dim;
  const int64_t V = p.value_dim;
  const int64_t channels = p.scalar_gate ? 1 : K;
  const int64_t h = hv / (p.value_heads / p.heads);
  const int64_t first = p.cu_seqlens[sequence];
  HeadInputs in;
  in.tokens = static_cast<int>(p.cu_seqlens[sequence + 1] - first);
  const auto rows = [&](const std::vector<float>& from, int64_t stride, int64_t column, int64_t width) {
    std::vector<double> to;
    for (int64_t t = first; t < first + in.tokens; ++t) {
      const float* row = from.data() + t * stride + column;
      to.insert(to.end(), row, row + width);
    }
    return to;
  };
  const auto matrix = [&](const std::vector<float>& from) {
    const float* state = from.data() + p.slots[sequence] * p.slot_stride + hv * V * K;
    return std::vector<double>(state, state + V * K);
  };
  in.q = rows(problem.q, p.q_stride, h * K, K);
  in.k = rows(problem.k, p.k_stride, h * K, K);
  in.v = rows(problem.v, p.v_stride, hv * V, V);
  in.gate = rows(problem.gate, p.gate_stride, hv * channels, channels);
  in.beta = rows(problem.beta, p.beta_stride, hv, 1);
  in.d_out = rows(problem.d_out, p.v_stride, hv * V, V);
  in.dt_bias.assign(problem.dt_bias.begin() + hv * channels, problem.dt_bias.begin() + (hv + 1) * channels);
  in.a_log = static_cast<double>(problem.a_log[static_cast<size_t>(hv)]);
  in.state = matrix(problem.state);
  in.d_state = matrix(problem.d_state);
  return in;
}

// The oracle's gradients, laid out like those of kda_backward(); what that leaves alone is kUntouched here.
inline Gradients<double> backward_oracle(BackwardProblem problem) {
  const KdaParams p = problem.params();
  const int64_t K = p.key_dim;
  const int64_t V = p.value_dim;
  const int64_t channels = p.scalar_gate ? 1 : K;
  const Gradients<float> empty = empty_gradients(problem);
  Gradients<double> all;
  const auto prepare = [](std::vector<double>& to, const std::vector<float>& from) {
    to.assign(from.begin(), from.end());
  };
  prepare(all.q, empty.q), prepare(all.k, empty.k), prepare(all.v, empty.v), prepare(all.gate, empty.gate);
  prepare(all.beta, empty.beta), prepare(all.state, empty.state);
  const bool raw = p.gate_kind == KdaGate::kNone;
  all.a_log.assign(empty.a_log.size(), raw ? kUntouched : 0.0);
  all.dt_bias.assign(empty.dt_bias.size(), raw ? kUntouched : 0.0);
  const auto at = [](std::vector<double>& x, int64_t i) -> double& { return x[static_cast<size_t>(i)]; };
  for (int n = 0; n < p.sequences; ++n) {
    for (int hv = 0; hv < p.value_heads; ++hv) {
      const HeadInputs in = head_inputs(problem, n, hv);
      const KdaReferenceGradients d = kda_backward_reference(
          p, in.tokens, in.q.data(), in.k.data(), in.v.data(), in.gate.data(), in.beta.data(), in.a_log,
          in.dt_bias.data(), in.state.data(), in.d_out.data(), in.d_state.data());
      const int64_t group = p.value_heads / p.heads;
      const int64_t h = hv / group;
      const auto put = [&](std::vector<double>& to, const std::vector<double>& from, int64_t stride,
                           int64_t column, int64_t width, bool add) {
        for (int64_t i = 0; i < in.tokens * width; ++i) {
          double& x = at(to, (p.cu_seqlens[n] + i / width) * stride + column + i % width);
          x = (add ? x : 0.0) + from[static_cast<size_t>(i)];
        }
      };
      put(all.q, d.q, p.q_stride, h * K, K, hv % group != 0);
      put(all.k, d.k, p.k_stride, h * K, K, hv % group != 0);
      put(all.v, d.v, p.v_stride, hv * V, V, false);
      put(all.gate, d.gate, p.gate_stride, hv * channels, channels, false);
      put(all.beta, d.beta, p.beta_stride, hv, 1, false);
      if (!raw) {
        at(all.a_log, hv) += d.a_log;
        for (int64_t c = 0; c < channels; ++c)
          at(all.dt_bias, hv * channels + c) += d.dt_bias[static_cast<size_t>(c)];
      }
      for (int64_t i = 0; in.tokens > 0 && i < V * K; ++i)
        at(all.state, p.slots[n] * p.slot_stride + hv * V * K + i) = d.state[static_cast<size_t>(i)];
    }
  }
  return all;
}

// |found - expected| / |expected| in the norm, over the elements that are written; untouched ones must agree.
inline double gradient_error(const std::vector<float>& found, const std::vector<double>& expected) {
  std::vector<float> f;
  std::vector<double> e;
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool untouched = expected[i] == static_cast<double>(kUntouched);
    if (untouched && found[i] != kUntouched) return HUGE_VAL;
    if (untouched) continue;
    f.push_back(found[i]);
    e.push_back(expected[i]);
  }
  return relative_error(f, e);
}

}  // namespace kilin::kda_testing
