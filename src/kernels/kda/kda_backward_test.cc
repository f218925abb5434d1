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

constexpr double kTolerance = 1e-5;
const std::vector<int> kLengths{0, 1, 15, 16, 17, 63, 64, 65, 200};

// kda_backward() on every instruction set against the double oracle. The gradients of a_log and dt_bias are
// sums over all tokens that may cancel: a_log of one head is a single number.
void expect_oracle(const BackwardProblem& problem, const std::string& what) {
  const Gradients<double> expected = backward_oracle(problem);
  for_each_isa([&](const std::string& isa) {
    const Gradients<float> found = run_backward(problem, 2);
    expected.for_each(found, [&](const char* name, const auto& e, const auto& f) {
      const std::string_view sum = name;
      const double tolerance = sum == "a_log" || sum == "dt_bias" ? 10.0 * kTolerance : kTolerance;
      EXPECT_LT(gradient_error(f, e), tolerance) << what << " d_" << name << " " << isa;
    });
  });
}

void expect_oracle(const Shape& shape, const std::string& what) {
  expect_oracle(BackwardProblem(shape), what);
}

Shape with_decay(int dim, const std::vector<int>& lengths) {
  return {.key_dim = dim, .value_dim = dim, .lengths = lengths, .gate = KdaGate::kNone};
}

TEST(KdaBackward, SquareHeadsOfEveryLengthFollowTheOracle) {
  expect_oracle({.key_dim = 32, .value_dim = 32, .lengths = kLengths}, "32");
  expect_oracle({.heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64, .lengths = kLengths}, "64");
  expect_oracle({.key_dim = 128, .value_dim = 128, .lengths = kLengths}, "128");
}

TEST(KdaBackward, OddDimensionsFollowTheOracle) {
  const int dims[][2] = {{60, 36}, {100, 100}, {256, 256}, {1, 1}, {3, 200}, {33, 5}, {128, 31}, {17, 64}};
  for (const auto& [key_dim, value_dim] : dims) {
    const Shape shape{.heads = 2,
                      .value_heads = 2,
                      .key_dim = key_dim,
                      .value_dim = value_dim,
                      .lengths = {1, 17, 63},
                      .l2norm = key_dim > 1};  // a normalised number is 1 or -1 and has no gradient
    expect_oracle(shape, std::to_string(key_dim) + "x" + std::to_string(value_dim));
  }
}

TEST(KdaBackward, EveryGateFollowsTheOracle) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded, KdaGate::kNone}) {
    for (bool scalar : {false, true}) {
      const Shape shape{.heads = 1,
                        .value_heads = 2,
                        .key_dim = 60,
                        .value_dim = 64,
                        .lengths = {1, 16, 65, 200},
                        .gate = gate,
                        .scalar_gate = scalar};
      expect_oracle(shape, "gate " + std::to_string(static_cast<int>(gate)) + (scalar ? " scalar" : ""));
    }
  }
}

TEST(KdaBackward, GradientsOfSharedHeadsAreSummed) {
  expect_oracle({.heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 32, .lengths = {1, 40, 129}},
                "GVA x 2");
  expect_oracle({.heads = 1, .value_heads = 3, .key_dim = 32, .value_dim = 64, .lengths = {33}}, "GVA x 3");
}

TEST(KdaBackward, TensorsMayBeSlicesOfWiderRows) {
  expect_oracle(
      {.heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 33, .lengths = {5, 70}, .padding = 7}, "7");
}

TEST(KdaBackward, NormAndSigmoidCanBeLeftToTheCaller) {
  BackwardProblem problem(
      {.key_dim = 64, .value_dim = 64, .lengths = {1, 50}, .l2norm = false, .beta_is_logit = false});
  for (float& x : problem.k) x /= 8.0f;
  expect_oracle(problem, "plain inputs");
}

TEST(KdaBackward, NoDecayOverAThousandTokens) {
  BackwardProblem problem(with_decay(64, {1000}));
  std::fill(problem.gate.begin(), problem.gate.end(), 0.0f);
  expect_oracle(problem, "g = 0");
}

TEST(KdaBackward, TotalForgettingAtRandomPlaces) {
  for (double share : {0.02, 0.3, 0.9, 1.0}) {
    for (float g : {-20.0f, -88.0f, -1000.0f, -1e30f}) {
      BackwardProblem problem(with_decay(64, {1, 16, 17, 65, 200}));
      Random random(7);
      for (float& x : problem.gate) x = random.uniform() < share ? g : x * 0.01f;
      // e^-20 everywhere leaves gradients of g of 1e-9, below the rounding errors of their summands
      const bool vanishing = share == 1.0 && g == -20.0f;
      if (!vanishing) expect_oracle(problem, "g = " + std::to_string(g) + " share " + std::to_string(share));
    }
  }
}

TEST(KdaBackward, HugeGateInputsGiveNoNan) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded}) {
    BackwardProblem problem({.key_dim = 32, .value_dim = 32, .lengths = {100}, .gate = gate});
    Random random(3);
    for (float& x : problem.gate) x *= random.uniform() < 0.2 ? 1e30f : 1.0f;
    expect_oracle(problem, "huge inputs");
  }
}

TEST(KdaBackward, RepeatedKeysStayStable) {
  for (float beta : {1.0f, 2.0f}) {
    Shape shape = with_decay(64, {15, 200});
    shape.beta_is_logit = false;
    shape.l2norm = false;
    BackwardProblem problem(shape);
    const float norm = std::sqrt(std::inner_product(&problem.k[0], &problem.k[64], &problem.k[0], 0.0f));
    for (size_t i = 0; i < 64; ++i) problem.k[i] /= norm;
    for (size_t i = 64; i < problem.k.size(); ++i) problem.k[i] = problem.k[i % 64];
    for (float& x : problem.gate) x *= 1e-3f;
    std::fill(problem.beta.begin(), problem.beta.end(), beta);
    expect_oracle(problem, "beta " + std::to_string(beta));
  }
}

TEST(KdaBackward, LongSequencesInPiecesGiveTheSameBits) {
  for_each_isa([&](const std::string& isa) {
    BackwardProblem problem(
        {.heads = 2, .value_heads = 4, .key_dim = 40, .value_dim = 48, .lengths = {333, 16, 20}});
    const Gradients<float> whole = run_backward(problem);
    for (int64_t memory : {int64_t{0}, int64_t{50'000}, int64_t{200'000}}) {
      problem.memory_per_thread = memory;
      const Gradients<float> pieces = run_backward(problem, 3);
      EXPECT_TRUE(same_bits(whole.q, pieces.q) && same_bits(whole.k, pieces.k) &&
                  same_bits(whole.v, pieces.v) && same_bits(whole.gate, pieces.gate) &&
                  same_bits(whole.beta, pieces.beta) && same_bits(whole.a_log, pieces.a_log) &&
                  same_bits(whole.dt_bias, pieces.dt_bias) && same_bits(whole.state, pieces.state))
          << isa << " " << memory;
    }
  });
}

TEST(KdaBackward, OnlyWantedGradientsAreWritten) {
  BackwardProblem problem({.heads = 1, .value_heads = 2, .key_dim = 24, .value_dim = 20, .lengths = {0, 37}});
  std::fill(problem.state.begin(), problem.state.end(), 0.0f);
  std::fill(problem.d_state.begin(), problem.d_state.end(), 0.0f);
  const Gradients<float> all = run_backward(problem);
  Gradients<float> some = empty_gradients(problem);
  KdaBackwardParams p = backward_params(problem, some);
  p.d_q = p.d_v = p.d_a_log = p.d_beta = p.d_state = nullptr;
  p.forward.state = nullptr;
  ThreadPool pool(1);
  kda_backward(p, pool);
  EXPECT_TRUE(same_bits(some.k, all.k) && same_bits(some.gate, all.gate) &&
              same_bits(some.dt_bias, all.dt_bias));
  const Gradients<float> untouched = empty_gradients(problem);
  EXPECT_TRUE(same_bits(some.q, untouched.q) && same_bits(some.v, untouched.v) &&
              same_bits(some.a_log, untouched.a_log) && same_bits(some.beta, untouched.beta) &&
              same_bits(some.state, untouched.state));
}

TEST(KdaBackward, EmptyBatchGivesZeroSums) {
  BackwardProblem problem({.heads = 2, .value_heads = 2, .lengths = {0, 0}});
  const Gradients<float> found = run_backward(problem);
  EXPECT_TRUE(same_bits(found.a_log, std::vector<float>(2)));
  EXPECT_TRUE(same_bits(found.dt_bias, std::vector<float>(64)));
  EXPECT_TRUE(same_bits(found.state, problem.d_state));
}

TEST(KdaBackward, WrongArgumentsAreNamed) {
  const auto message = [](const std::function<void(KdaBackwardParams&)>& spoil) -> std::string {
    BackwardProblem problem({.lengths = {4}});
    Gradients<float> to = empty_gradients(problem);
    KdaBackwardParams p = backward_params(problem, to);
    spoil(p);
    try {
      validate(p);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message([](KdaBackwardParams&) {}), "");
  EXPECT_EQ(message([](KdaBackwardParams& p) { p.forward.q = nullptr; }), "KDA: q is null");
  EXPECT_EQ(message([](KdaBackwardParams& p) { p.d_out = nullptr; }), "KDA gradients: d_out is null");
  EXPECT_EQ(message([](KdaBackwardParams& p) { p.d_v_stride = 31; }),
            "KDA gradients: d_v_stride is 31, expected at least 32");
  EXPECT_EQ(message([](KdaBackwardParams& p) { p.d_slot_stride = 5; }),
            "KDA gradients: d_slot_stride is 5, expected at least 1024");
  EXPECT_EQ(message([](KdaBackwardParams& p) { p.forward.gate_kind = KdaGate::kNone; }),
            "KDA gradients: d_a_log is given, but there is no gate");
}

TEST(KdaBackward, FlopCountIsThatOfTheFormulas) {
  BackwardProblem problem({.key_dim = 128, .value_dim = 128, .lengths = {17}});
  EXPECT_EQ(kda_backward_flops(problem.params()), 17 * 16.0 * 128 * 128 + 120 * 27.0 * 128);
}

}  // namespace
}  // namespace kilin
