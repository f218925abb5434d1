// SPDX-License-Identifier: Apache-2.0
// The only oracle of the KDA gradients: the adjoint of the recurrence in kda_reference.h, token by token from
// the last to the first, in double. With S' = S diag(e^g), r = v - S' k, d = beta r, S <- S' + d k^T, o = S
// q:
//     dS += do q^T     dq = S^T do
//     dd = dS k        dk = dS^T d - beta S'^T dd      dv = beta dd     dbeta = dd . r
//     dS' = dS - dv k^T     dg_c = sum_v dS'_vc S'_vc     dS <- dS' diag(e^g)
// where q and k are normalised and q scaled; then the adjoints of those transforms.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/kda/kda.h"

namespace kilin {

// Gradients of one sequence and value head, in the shapes of kda_reference().
struct KdaReferenceGradients {
  std::vector<double> q, k, v, gate, beta, dt_bias, state;
  double a_log = 0.0;
};

namespace kda_backward_reference_detail {

// Gradient of x [K] from that of y = factor x / sqrt(sum x^2 + 1e-6), or of y = factor x
inline void unnormalise(const KdaParams& params, const double* x, double factor,
                        const std::vector<double>& dy, double* dx) {
  double sum = 1e-6;
  double dot = 0.0;
  for (int i = 0; i < params.key_dim; ++i) sum += x[i] * x[i];
  for (int i = 0; i < params.key_dim; ++i) dot += x[i] * dy[static_cast<size_t>(i)];
  const double r = 1.0 / std::sqrt(sum);
  for (int i = 0; i < params.key_dim; ++i) {
    const double d = dy[static_cast<size_t>(i)];
    dx[i] = factor * (params.l2norm ? r * (d - x[i] * dot * r * r) : d);
  }
}

// A gate value with its derivatives
struct Gate {
  double g, by_x, by_a_log;
};

inline Gate gate(const KdaParams& params, double x, double a_log) {
  const double rate = std::exp(a_log);
  const auto sigmoid = [](double y) { return 1.0 / (1.0 + std::exp(-y)); };
  if (params.gate_kind == KdaGate::kNone) return {x, 1.0, 0.0};
  if (params.gate_kind == KdaGate::kSoftplus) {
    const double g = -rate * (x > 20.0 ? x : std::log(1.0 + std::exp(x)));
    return {g, -rate * (x > 20.0 ? 1.0 : sigmoid(x)), g};
  }
  const double bound = static_cast<double>(params.lower_bound);
  const double s = sigmoid(rate * x);
  const double slope = bound * s * sigmoid(-rate * x) * rate;
  return {bound * s, slope, slope * x};
}

}  // namespace kda_backward_reference_detail

// Arguments as kda_reference(); d_out [tokens][V], d_state [V][K] of the final state. Keeps the state of
// every token.
inline KdaReferenceGradients kda_backward_reference(const KdaParams& params, int tokens, const double* q,
                                                    const double* k, const double* v,
                                                    const double* gate_input, const double* beta,
                                                    double a_log, const double* dt_bias, const double* state,
                                                    const double* d_out, const double* d_state) {
  namespace detail = kda_backward_reference_detail;
  const int K = params.key_dim;
  const int V = params.value_dim;
  const int channels = params.scalar_gate ? 1 : K;
  const int64_t size = static_cast<int64_t>(V) * K;
  const auto factor_of = [&](const double* x) {
    double sum = 1e-6;
    for (int i = 0; i < K; ++i) sum += x[i] * x[i];
    return params.l2norm ? 1.0 / std::sqrt(sum) : 1.0;
  };
  const auto beta_of = [&](int t) {
    return params.beta_is_logit ? 1.0 / (1.0 + std::exp(-beta[t])) : beta[t];
  };
  const auto gate_of = [&](int t, int i) {
    const int channel = params.scalar_gate ? 0 : i;
    const double bias = params.gate_kind == KdaGate::kNone ? 0.0 : dt_bias[channel];
    return detail::gate(params, gate_input[static_cast<int64_t>(t) * channels + channel] + bias, a_log);
  };
  // decayed[t] = S' and residual[t] = r of every token
  std::vector<double> decayed(static_cast<size_t>(tokens * size));
  std::vector<double> residual(static_cast<size_t>(tokens) * static_cast<size_t>(V));
  std::vector<double> now(state, state + size);
  for (int t = 0; t < tokens; ++t) {
    const double* key = k + static_cast<int64_t>(t) * K;
    const double factor = factor_of(key);
    for (int j = 0; j < V; ++j) {
      double* row = now.data() + static_cast<int64_t>(j) * K;
      double r = v[static_cast<int64_t>(t) * V + j];
      for (int i = 0; i < K; ++i) {
        row[i] *= std::exp(gate_of(t, i).g);
        decayed[static_cast<size_t>(t * size + static_cast<int64_t>(j) * K + i)] = row[i];
        r -= row[i] * key[i] * factor;
      }
      residual[static_cast<size_t>(static_cast<int64_t>(t) * V + j)] = r;
      for (int i = 0; i < K; ++i) row[i] += beta_of(t) * r * key[i] * factor;
    }
  }

  KdaReferenceGradients d;
  d.q.resize(static_cast<size_t>(tokens * K));
  d.k.resize(static_cast<size_t>(tokens * K));
  d.v.resize(static_cast<size_t>(tokens * V));
  d.gate.resize(static_cast<size_t>(tokens * channels));
  d.beta.resize(static_cast<size_t>(tokens));
  d.dt_bias.resize(static_cast<size_t>(channels));
  d.state.assign(d_state, d_state + size);
  for (int t = tokens - 1; t >= 0; --t) {
    const double* query = q + static_cast<int64_t>(t) * K;
    const double* key = k + static_cast<int64_t>(t) * K;
    const double q_factor = factor_of(query) * static_cast<double>(params.scale);
    const double k_factor = factor_of(key);
    const double b = beta_of(t);
    std::vector<double> dq(static_cast<size_t>(K)), dk(static_cast<size_t>(K)), dg(static_cast<size_t>(K));
    double d_beta = 0.0;
    for (int j = 0; j < V; ++j) {
      double* row = d.state.data() + static_cast<int64_t>(j) * K;
      const double* old = decayed.data() + t * size + static_cast<int64_t>(j) * K;
      const double r = residual[static_cast<size_t>(static_cast<int64_t>(t) * V + j)];
      const double answer = d_out[static_cast<int64_t>(t) * V + j];
      double dd = 0.0;
      for (int i = 0; i < K; ++i) {
        row[i] += answer * query[i] * q_factor;
        dq[static_cast<size_t>(i)] += (old[i] + b * r * key[i] * k_factor) * answer;
        dd += row[i] * key[i] * k_factor;
      }
      d_beta += dd * r;
      d.v[static_cast<size_t>(static_cast<int64_t>(t) * V + j)] = b * dd;
      for (int i = 0; i < K; ++i) {
        dk[static_cast<size_t>(i)] += row[i] * b * r - old[i] * b * dd;
        row[i] -= b * dd * key[i] * k_factor;
        dg[static_cast<size_t>(i)] += row[i] * old[i];
        row[i] *= std::exp(gate_of(t, i).g);
      }
    }
    d.beta[static_cast<size_t>(t)] = params.beta_is_logit ? d_beta * b * (1.0 - b) : d_beta;
    detail::unnormalise(params, query, static_cast<double>(params.scale), dq, d.q.data() + t * K);
    detail::unnormalise(params, key, 1.0, dk, d.k.data() + t * K);
    for (int i = 0; i < K; ++i) {
      const auto channel = static_cast<size_t>(params.scalar_gate ? 0 : i);
      const detail::Gate gate = gate_of(t, i);
      const double slope = dg[static_cast<size_t>(i)];
      d.gate[static_cast<size_t>(t * channels) + channel] += slope * gate.by_x;
      if (params.gate_kind == KdaGate::kNone) continue;
      d.dt_bias[channel] += slope * gate.by_x;
      d.a_log += slope * gate.by_a_log;
    }
  }
  return d;
}

}  // namespace kilin
