// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda_backward.h"

#include <gtest/gtest.h>

#include <complex>

#include "base/error.h"
#include "kernels/kda/kda_backward_test_util.h"

namespace kilin {
namespace {

using namespace kda_testing;
using Complex = std::complex<double>;

// The inputs of one head with every input reachable by one index
struct ComplexInputs {
  std::vector<Complex> q, k, v, gate, beta, dt_bias, state, a_log;

  explicit ComplexInputs(const HeadInputs& in)
      : q(in.q.begin(), in.q.end()),
        k(in.k.begin(), in.k.end()),
        v(in.v.begin(), in.v.end()),
        gate(in.gate.begin(), in.gate.end()),
        beta(in.beta.begin(), in.beta.end()),
        dt_bias(in.dt_bias.begin(), in.dt_bias.end()),
        state(in.state.begin(), in.state.end()),
        a_log{Complex(in.a_log)} {}
};

// dloss/dx[i] for a member x of the inputs: the imaginary part of the loss after a step of 1e-30 i
double complex_step(const KdaParams& p, const HeadInputs& in, std::vector<Complex> ComplexInputs::*member,
                    size_t index) {
  ComplexInputs x(in);
  (x.*member)[index] += Complex(0.0, 1e-30);
  if (p.gate_kind == KdaGate::kNone) x.dt_bias.assign(x.dt_bias.size(), 0.0);
  std::vector<Complex> out(in.d_out.size());
  kda_reference<Complex>(p, in.tokens, x.q.data(), x.k.data(), x.v.data(), x.gate.data(), x.beta.data(),
                         x.a_log[0], x.dt_bias.data(), x.state.data(), out.data());
  double loss = 0.0;
  for (size_t i = 0; i < out.size(); ++i) loss += std::imag(out[i]) * in.d_out[i];
  for (size_t i = 0; i < x.state.size(); ++i) loss += std::imag(x.state[i]) * in.d_state[i];
  return loss * 1e30;
}

void expect_complex_step(const Shape& shape, const std::string& what) {
  BackwardProblem problem(shape);
  const KdaParams p = problem.params();
  const HeadInputs in = head_inputs(problem, 0, 0);
  const KdaReferenceGradients d = kda_backward_reference(
      p, in.tokens, in.q.data(), in.k.data(), in.v.data(), in.gate.data(), in.beta.data(), in.a_log,
      in.dt_bias.data(), in.state.data(), in.d_out.data(), in.d_state.data());
  const auto compare = [&](const char* name, std::vector<Complex> ComplexInputs::*member,
                           const std::vector<double>& found) {
    std::vector<double> expected;
    for (size_t i = 0; i < found.size(); ++i) expected.push_back(complex_step(p, in, member, i));
    EXPECT_LT(relative_error(found, expected), 1e-12) << what << " " << name;
    EXPECT_GT(std::inner_product(found.begin(), found.end(), found.begin(), 0.0), 0.0) << what << " " << name;
  };
  compare("q", &ComplexInputs::q, d.q);
  compare("k", &ComplexInputs::k, d.k);
  compare("v", &ComplexInputs::v, d.v);
  compare("gate", &ComplexInputs::gate, d.gate);
  compare("beta", &ComplexInputs::beta, d.beta);
  compare("state", &ComplexInputs::state, d.state);
  if (shape.gate == KdaGate::kNone) return;
  compare("dt_bias", &ComplexInputs::dt_bias, d.dt_bias);
  compare("a_log", &ComplexInputs::a_log, {d.a_log});
}

TEST(KdaBackwardReference, IsTheComplexStepOfTheRecurrence) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded, KdaGate::kNone}) {
    for (bool scalar : {false, true}) {
      for (bool transforms : {false, true}) {
        const std::string what = "gate " + std::to_string(static_cast<int>(gate)) +
                                 (scalar ? " scalar" : "") + (transforms ? " transforms" : "");
        expect_complex_step({.key_dim = 5,
                             .value_dim = 4,
                             .lengths = {9},
                             .gate = gate,
                             .scalar_gate = scalar,
                             .l2norm = transforms,
                             .beta_is_logit = transforms},
                            what);
      }
    }
  }
}

}  // namespace
}  // namespace kilin
