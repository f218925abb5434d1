// SPDX-License-Identifier: Apache-2.0
// The only oracle of the KDA kernels: the recurrence of kda.h written down once, for T = double, float, or
// std::complex<double> (complex-step derivatives: nothing but analytic functions; branches look at the real
// part).
#pragma once
#include <cmath>
#include <complex>
#include <vector>

#include "kernels/kda/kda.h"

namespace kilin {

// One sequence and value head: q, k [tokens][K], v [tokens][V], gate [tokens][K or 1], beta [tokens],
// dt_bias [K or 1], state [V][K] in and out, out [tokens][V]. Of params only the settings and K, V are read.
template <class T>
void kda_reference(const KdaParams& params, int tokens, const T* q, const T* k, const T* v, const T* gate,
                   const T* beta, T a_log, const T* dt_bias, T* state, T* out) {
  const int K = params.key_dim;
  const int V = params.value_dim;
  const auto sigmoid = [](T x) { return 1.0 / (1.0 + std::exp(-x)); };
  const auto softplus = [](T x) { return std::real(x) > 20.0 ? x : std::log(1.0 + std::exp(x)); };
  const auto decay = [&](T x, T bias) -> T {
    if (params.gate_kind == KdaGate::kSoftplus) return std::exp(-std::exp(a_log) * softplus(x + bias));
    if (params.gate_kind == KdaGate::kNone) return std::exp(x);
    return std::exp(static_cast<double>(params.lower_bound) * sigmoid(std::exp(a_log) * (x + bias)));
  };
  const auto inverse_norm = [&](const T* x) {
    T sum = 1e-6;
    for (int i = 0; i < K; ++i) sum += x[i] * x[i];
    return params.l2norm ? 1.0 / std::sqrt(sum) : T(1.0);
  };
  for (int t = 0; t < tokens; ++t, q += K, k += K, v += V, out += V, gate += params.scalar_gate ? 1 : K) {
    const T q_factor = inverse_norm(q) * static_cast<double>(params.scale);
    const T k_factor = inverse_norm(k);
    const T b = params.beta_is_logit ? sigmoid(beta[t]) : beta[t];
    for (int j = 0; j < V; ++j) {
      T* row = state + static_cast<int64_t>(j) * K;
      T recalled = 0.0;
      for (int i = 0; i < K; ++i) {
        const int channel = params.scalar_gate ? 0 : i;
        row[i] *= decay(gate[channel], dt_bias[channel]);
        recalled += row[i] * k[i] * k_factor;
      }
      out[j] = 0.0;
      for (int i = 0; i < K; ++i) {
        row[i] += b * (v[j] - recalled) * k[i] * k_factor;
        out[j] += row[i] * q[i] * q_factor;
      }
    }
  }
}

}  // namespace kilin
