// SPDX-License-Identifier: Apache-2.0
#include "kernels/kda/kda.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "kernels/kda/kda_test_util.h"

namespace kilin {
namespace {

using namespace kda_testing;

const std::vector<int> kLengths{0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 150, 1000};
constexpr double kTolerance = 1e-5;

// Every kernel on every instruction set against the double oracle.
void expect_oracle(const Problem& problem, const std::string& what) {
  const std::vector<Expected> expected = oracle(problem);
  for_each_isa([&](const std::string& isa) {
    EXPECT_LT(worst_error(problem, run(problem, kda_recurrent), expected), kTolerance)
        << what << " recurrent " << isa;
    EXPECT_LT(worst_error(problem, run(problem, kda_chunk, 2), expected), kTolerance)
        << what << " chunk " << isa;
    EXPECT_LT(worst_error(problem, run(problem, kda_forward), expected), kTolerance)
        << what << " forward " << isa;
  });
}

void expect_oracle(const Shape& shape, const std::string& what) { expect_oracle(Problem(shape), what); }

Shape with_decay(int dim, const std::vector<int>& lengths) {
  return {.key_dim = dim, .value_dim = dim, .lengths = lengths, .gate = KdaGate::kNone};
}

TEST(Kda, SquareHeadsOfEveryLengthFollowTheOracle) {
  expect_oracle({.key_dim = 32, .value_dim = 32, .lengths = kLengths}, "32");
  expect_oracle({.heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64, .lengths = kLengths}, "64");
  expect_oracle({.key_dim = 128, .value_dim = 128, .lengths = kLengths}, "128");
}

TEST(Kda, OddDimensionsFollowTheOracle) {
  const std::vector<int> lengths{1, 2, 17, 63, 129};
  const int dims[][2] = {{60, 36}, {100, 100}, {256, 256}, {1, 1}, {3, 200}, {33, 5}, {128, 31}, {17, 64}};
  for (const auto& [key_dim, value_dim] : dims) {
    const Shape shape{
        .heads = 2, .value_heads = 2, .key_dim = key_dim, .value_dim = value_dim, .lengths = lengths};
    expect_oracle(shape, std::to_string(key_dim) + "x" + std::to_string(value_dim));
  }
}

TEST(Kda, EveryGateFollowsTheOracle) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded, KdaGate::kNone}) {
    for (bool scalar : {false, true}) {
      const Shape shape{.heads = 1,
                        .value_heads = 2,
                        .key_dim = 60,
                        .value_dim = 64,
                        .lengths = {1, 16, 65, 300},
                        .gate = gate,
                        .scalar_gate = scalar};
      expect_oracle(shape, "gate " + std::to_string(static_cast<int>(gate)) + (scalar ? " scalar" : ""));
    }
  }
}

TEST(Kda, ValueHeadsShareTheirQueryAndKeyHead) {
  expect_oracle({.heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 32, .lengths = {1, 40, 129}},
                "GVA x 2");
  expect_oracle({.heads = 1, .value_heads = 3, .key_dim = 32, .value_dim = 64, .lengths = {33}}, "GVA x 3");
}

TEST(Kda, InputsMayBeSlicesOfWiderRows) {
  expect_oracle(
      {.heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 32, .lengths = {5, 70}, .padding = 7}, "7");
}

TEST(Kda, NormAndSigmoidCanBeLeftToTheCaller) {
  Shape shape{.key_dim = 64, .value_dim = 64, .lengths = {1, 50}, .l2norm = false, .beta_is_logit = false};
  Problem problem(shape);
  for (float& x : problem.k) x /= 8.0f;
  expect_oracle(problem, "plain inputs");
}

TEST(Kda, MissingBiasAndRateMeanZero) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded}) {
    Problem problem({.key_dim = 32, .value_dim = 32, .lengths = {40}, .gate = gate});
    std::fill(problem.a_log.begin(), problem.a_log.end(), 0.0f);
    std::fill(problem.dt_bias.begin(), problem.dt_bias.end(), 0.0f);
    Problem copy = problem;
    KdaParams p = copy.params();
    p.a_log = p.dt_bias = nullptr;
    ThreadPool pool(1);
    kda_chunk(p, pool);
    EXPECT_TRUE(same_bits(copy.out, run(problem, kda_chunk).out));
  }
}

TEST(Kda, NoDecayIsExactOverAThousandTokens) {
  Problem problem(with_decay(64, {1000}));
  std::fill(problem.gate.begin(), problem.gate.end(), 0.0f);
  expect_oracle(problem, "g = 0");
}

TEST(Kda, TotalForgettingAtRandomPlacesStaysExact) {
  for (double share : {0.02, 0.3, 0.9, 1.0}) {
    for (float g : {-20.0f, -88.0f, -1000.0f, -1e30f}) {
      Problem problem(with_decay(64, {1, 16, 17, 200}));
      Random random(7);
      for (float& x : problem.gate) x = random.uniform() < share ? g : x * 0.01f;
      expect_oracle(problem, "g = " + std::to_string(g) + " share " + std::to_string(share));
    }
  }
}

TEST(Kda, HugeGateInputsGiveNoNan) {
  for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded}) {
    Problem problem({.key_dim = 32, .value_dim = 32, .lengths = {100}, .gate = gate});
    Random random(3);
    for (float& x : problem.gate) x *= random.uniform() < 0.2 ? 1e30f : 1.0f;
    expect_oracle(problem, "huge inputs");
  }
}

// beta = 2 makes every token a reflection, with eigenvalue 1 - 2 |k|^2: the keys come normalised, because an
// error of 1 ulp in the norm of one key that is repeated 300 times is an error of 300 ulp in the state of any
// fp32 kernel.
TEST(Kda, RepeatedKeysStayStable) {
  for (float beta : {1.0f, 2.0f}) {
    Shape shape = with_decay(64, {15, 300});
    shape.beta_is_logit = false;
    shape.l2norm = false;
    Problem problem(shape);
    const float norm = std::sqrt(std::inner_product(&problem.k[0], &problem.k[64], &problem.k[0], 0.0f));
    for (size_t i = 0; i < 64; ++i) problem.k[i] /= norm;
    for (size_t i = 64; i < problem.k.size(); ++i) problem.k[i] = problem.k[i % 64];
    for (float& x : problem.gate) x *= 1e-3f;
    std::fill(problem.beta.begin(), problem.beta.end(), beta);
    expect_oracle(problem, "beta " + std::to_string(beta));
  }
}

TEST(Kda, ZeroBetaOnlyDecays) {
  Shape shape = with_decay(32, {1, 100});
  shape.beta_is_logit = false;
  Problem problem(shape);
  for (float& x : problem.gate) x *= 1e-2f;
  std::fill(problem.beta.begin(), problem.beta.end(), 0.0f);
  expect_oracle(problem, "beta 0");
}

TEST(Kda, LargeStatesKeepTheirRelativeError) {
  expect_oracle({.key_dim = 128, .value_dim = 64, .lengths = {1, 70}, .state_size = 1e3}, "state 1e3");
}

TEST(Kda, BatchGivesTheBitsOfSingleSequences) {
  for_each_isa([&](const std::string& isa) {
    for (KdaFunction function : {&kda_recurrent, &kda_chunk, &kda_forward}) {
      const Problem batch(
          {.heads = 2, .value_heads = 2, .key_dim = 60, .value_dim = 36, .lengths = kLengths});
      const Result together = run(batch, function, 2);
      Result single{batch.out, batch.state};
      ThreadPool pool(1);
      for (size_t n = 0; n < batch.slots.size(); ++n) {
        Problem one = batch;
        KdaParams p = one.params();
        p.sequences = 1;
        p.cu_seqlens += n;
        p.slots += n;
        p.state = single.state.data();
        p.out = single.out.data();
        function(p, pool);
      }
      EXPECT_TRUE(same_bits(together.out, single.out)) << isa;
      EXPECT_TRUE(same_bits(together.state, single.state)) << isa;
    }
  });
}

TEST(Kda, ThreadsDoNotChangeTheBits) {
  for_each_isa([&](const std::string& isa) {
    for (int value_dim : {128, 100, 36}) {
      const Problem problem({.key_dim = 64, .value_dim = value_dim, .lengths = {70}});
      for (KdaFunction function : {&kda_recurrent, &kda_chunk}) {
        const Result one = run(problem, function, 1);
        for (int threads : {2, 3, 7}) {
          const Result more = run(problem, function, threads);
          EXPECT_TRUE(same_bits(one.out, more.out) && same_bits(one.state, more.state))
              << isa << " " << threads;
        }
      }
    }
  });
}

TEST(Kda, PrefillInTwoPartsIsPrefillInOne) {
  const Problem whole({.key_dim = 64, .value_dim = 64, .lengths = {150}});
  for_each_isa([&](const std::string& isa) {
    const Result once = run(whole, kda_chunk);
    for (int cut : {1, 16, 50, 149}) {
      Problem parts = whole;
      ThreadPool pool(1);
      for (const auto& [from, to] : {std::pair{0, cut}, std::pair{cut, 150}}) {
        parts.cu_seqlens = {from, to};
        kda_chunk(parts.params(), pool);
      }
      EXPECT_LT(relative_error(parts.out, once.out), kTolerance) << isa << " cut at " << cut;
      EXPECT_LT(relative_error(parts.state, once.state), kTolerance) << isa << " cut at " << cut;
      EXPECT_TRUE(cut != 16 || same_bits(parts.out, once.out)) << "a cut between chunks changes nothing";
    }
  });
}

TEST(Kda, SlotsOfNobodyStayUntouched) {
  Problem problem({.heads = 2, .value_heads = 2, .lengths = {3, 0, 40}, .padding = 5});
  for (float& x : problem.state) x = 1e30f;
  const int64_t used = 2 * 32 * 32;
  for (int sequence : {0, 2}) {
    float* slot = problem.state.data() + problem.slots[static_cast<size_t>(sequence)] * problem.slot_stride();
    std::fill(slot, slot + used, 0.5f);
  }
  for_each_isa([&](const std::string& isa) {
    for (KdaFunction function : {&kda_recurrent, &kda_chunk}) {
      const Result result = run(problem, function);
      for (size_t i = 0; i < problem.state.size(); ++i) {
        ASSERT_TRUE(problem.state[i] != 1e30f || result.state[i] == 1e30f) << isa << " at " << i;
      }
    }
  });
}

TEST(Kda, PaddingOfTheOutputStaysUntouched) {
  Problem problem(
      {.heads = 2, .value_heads = 2, .key_dim = 33, .value_dim = 37, .lengths = {21}, .padding = 9});
  for (KdaFunction function : {&kda_recurrent, &kda_chunk}) {
    const Result result = run(problem, function, 2);
    for (size_t i = 0; i < result.out.size(); ++i) {
      ASSERT_TRUE(i % (2 * 37 + 9) < 2 * 37 || result.out[i] == 0.0f) << i;
    }
  }
}

TEST(Kda, WrongArgumentsAreNamed) {
  const auto message = [](const std::function<void(KdaParams&)>& spoil) -> std::string {
    Problem problem({.lengths = {4}});
    KdaParams p = problem.params();
    spoil(p);
    try {
      validate(p);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message([](KdaParams&) {}), "");
  EXPECT_EQ(message([](KdaParams& p) { p.key_dim = 257; }), "KDA: key_dim is 257, expected 1 to 256");
  EXPECT_EQ(message([](KdaParams& p) { p.value_dim = 0; }), "KDA: value_dim is 0, expected 1 to 256");
  EXPECT_EQ(message([](KdaParams& p) { p.heads = 2; }), "KDA: value_heads is 1, expected a multiple of 2");
  EXPECT_EQ(message([](KdaParams& p) { p.q = nullptr; }), "KDA: q is null");
  EXPECT_EQ(message([](KdaParams& p) { p.out_stride = 31; }), "KDA: out_stride is 31, expected at least 32");
  EXPECT_EQ(message([](KdaParams& p) { p.slot_stride = 1; }),
            "KDA: slot_stride is 1, expected at least 1024");
  const int32_t falling[] = {4, 0};
  EXPECT_EQ(message([&](KdaParams& p) { p.cu_seqlens = falling; }),
            "KDA: cu_seqlens[1] is 0, expected at least 4");
  const int32_t two[] = {0, 2, 4};
  const int32_t same[] = {1, 1};
  EXPECT_EQ(message([&](KdaParams& p) { p.sequences = 2, p.cu_seqlens = two, p.slots = same; }),
            "KDA: slot 1 belongs to two sequences");
  const int32_t negative[] = {-1};
  EXPECT_EQ(message([&](KdaParams& p) { p.slots = negative; }), "KDA: slots[0] is -1, expected 0 or more");
}

TEST(Kda, FlopCountsAreThoseOfTheFormulas) {
  Problem problem({.key_dim = 128, .value_dim = 128, .lengths = {16}});
  EXPECT_EQ(kda_chunk_flops(problem.params()), 16 * 6.0 * 128 * 128 + 16 * 4.0 * 128 + 120 * 9.0 * 128);
  EXPECT_EQ(kda_recurrent_flops(problem.params()), 16 * 7.0 * 128 * 128);
  EXPECT_EQ(kda_bytes(problem.params()), 4.0 * (16 * (5.0 * 128 + 1) + 2.0 * 128 * 128));
}

}  // namespace
}  // namespace kilin
