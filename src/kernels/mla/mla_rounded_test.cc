// SPDX-License-Identifier: Apache-2.0
// Latent attention with rounded activations (mla_dpbf16.h), against the definition in double. Where the
// machine does not round, the exact forms pass the same tests.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "kernels/mla/mla.h"
#include "kernels/mla/mla_orders.h"
#include "kernels/mla/mla_test_util.h"

namespace kilin {
namespace {

using mla_testing::Problem;
using mla_testing::relative_difference;
using mla_testing::Shape;

// A number rounded to bfloat16 moves by up to 2^-8 of itself, evenly; the root mean square over a binade is
// 0.72 2^-8 / sqrt(3) = 1.6e-3 (docs/decisions/rounded-activations.md). An output is a sum of weights times
// values. In the expanded order latents, values and weights are rounded, each of which moves it by that much,
// and in the score latents, keys and queries, which move it by that much of the score's standard deviation, 1
// here, and the weight likewise: 1.6e-3 sqrt(6) = 3.9e-3, with half as much again for what few keys leave to
// chance. The absorbed order rounds latents and queries in the score, weights and latents behind it: less.
constexpr double kRounded = 5.9e-3;

class MlaRounded : public mla_testing::IsaCacheTest {
 protected:
  static Problem make(const Shape& shape, const std::vector<std::pair<int64_t, int64_t>>& pasts, double scale,
                      uint64_t seed) {
    return {shape, pasts, type(), scale, seed, Dtype::kBF16};
  }
  static MlaParams rounded(const Problem& problem) {
    MlaParams p = problem.params();
    p.activations = Activations::kRounded;
    return p;
  }
};

constexpr Shape kShapes[] = {{4, 32, 32, 32, 64}, {2, 16, 8, 16, 32},   {3, 20, 6, 12, 44},
                             {1, 7, 0, 5, 24},    {32, 16, 16, 16, 32}, {2, 128, 64, 128, 512},
                             {9, 48, 32, 80, 64}, {37, 16, 0, 33, 128}};

TEST_P(MlaRounded, both_orders_agree_with_the_definition_at_every_length) {
  for (const Shape& shape : kShapes) {
    const bool large = shape.latent > 100 || shape.heads > 30;
    for (auto [past, count] : {std::pair<int64_t, int64_t>{0, 1},
                               {0, 17},
                               {1, 2},
                               {63, 1},
                               {64, 1},
                               {127, 2},
                               {128, 3},
                               {130, 65},
                               {1100, 3},
                               {0, 200},
                               {31, 97}}) {
      if (large && past + count > 130) continue;
      Problem problem = make(shape, {{past, count}}, 1.0, static_cast<uint64_t>(past * 1000 + count));
      mla_expanded(rounded(problem), problem.sequence(), pool_);
      problem.expect_exact("expanded", kRounded);
      problem.forget();
      mla_absorbed(rounded(problem), problem.sequence(), pool_);
      problem.expect_exact("absorbed", kRounded);
    }
  }
}

// Scores of standard deviation 300: a rounding moves one by 0.5 to 1, so the choice among near winners is not
// that of the definition, but a weight never leaves (0, 1] and an output is a mean of values, which are of
// size 1.
TEST_P(MlaRounded, sharp_attention_does_not_overflow) {
  Problem problem = make(kShapes[0], {{300, 5}}, 300.0, 3);
  for (auto* order : {&mla_absorbed, &mla_expanded}) {
    problem.forget();
    order(rounded(problem), problem.sequence(), pool_);
    for (float x : problem.out()) ASSERT_LT(std::abs(x), 8.0f);
  }
}

TEST_P(MlaRounded, several_sequences_in_one_call_are_as_if_alone) {
  const std::vector<std::pair<int64_t, int64_t>> pasts{{5, 1}, {700, 3}, {0, 0}, {64, 90}, {0, 1}, {300, 1}};
  Problem problem = make(kShapes[0], pasts, 1.0, 21);
  mla_attention(rounded(problem), pool_);
  problem.expect_exact("together", kRounded);
  const std::vector<float> together = problem.out();
  problem.forget();
  for (size_t i = 0; i < pasts.size(); ++i) {
    MlaParams one = rounded(problem);
    one.sequences = 1;
    one.sequence += i;
    mla_attention(one, pool_);
  }
  EXPECT_LT(relative_difference(together, problem.out()), kRounded);
}

TEST_P(MlaRounded, the_number_of_threads_does_not_change_a_bit) {
  for (auto [past, count] : {std::pair<int64_t, int64_t>{2500, 2}, {40, 700}, {4000, 1100}}) {
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 3}) {
      Problem problem = make(kShapes[0], {{past, count}}, 1.0, 8);
      ThreadPool pool(threads);
      mla_attention(rounded(problem), pool);
      results.push_back(problem.out());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST_P(MlaRounded, any_split_of_a_prompt_is_within_the_rounding) {
  const int64_t tokens = 330;
  Problem whole = make(kShapes[0], {{0, tokens}}, 1.0, 77);
  int64_t past = 0;
  for (int64_t count : {1, 2, 61, 1, 64, 129, 72}) {
    MlaSequence part = whole.sequence();
    part.first = part.past = past;
    part.count = count;
    MlaParams p = rounded(whole);
    p.sequence = &part;
    mla_attention(p, pool_);
    past += count;
  }
  ASSERT_EQ(past, tokens);
  whole.expect_exact("in parts", kRounded);
}

// More keys than a block of the expanded order holds, and a sum that goes on from one to the next.
TEST(MlaRoundedLong, orders_agree_over_several_blocks) {
  Problem problem(kShapes[0], {{9000, 200}}, Dtype::kF16, 1.0, 5, Dtype::kBF16);
  MlaParams p = problem.params();
  p.activations = Activations::kRounded;
  ThreadPool pool(2);
  mla_expanded(problem.params(), problem.sequence(), pool);
  const std::vector<float> exact = problem.out();
  mla_expanded(p, problem.sequence(), pool);
  EXPECT_LT(relative_difference(exact, problem.out()), kRounded);
  mla_absorbed(p, problem.sequence(), pool);
  EXPECT_LT(relative_difference(exact, problem.out()), kRounded);
}

TEST_P(MlaRounded, a_latent_that_is_no_number_makes_what_sees_it_none) {
  Problem problem = make(kShapes[0], {{200, 2}}, 1.0, 4);
  std::vector<float> row(64 + 32, std::numeric_limits<float>::quiet_NaN());
  problem.store(70, row);
  for (auto* order : {&mla_absorbed, &mla_expanded}) {
    problem.forget();
    std::fill(problem.out().begin(), problem.out().end(), 0.0f);
    order(rounded(problem), problem.sequence(), pool_);
    for (float x : problem.out()) ASSERT_FALSE(std::isfinite(x));
  }
}

// Neither with float32 weights nor where it was not asked for.
TEST_P(MlaRounded, is_a_choice) {
  Problem problem(kShapes[0], {{50, 40}}, type(), 1.0, 9, Dtype::kF32);
  for (auto* order : {&mla_absorbed, &mla_expanded}) {
    order(problem.params(), problem.sequence(), pool_);
    const std::vector<float> exact = problem.out();
    problem.forget();
    order(rounded(problem), problem.sequence(), pool_);
    EXPECT_EQ(exact, problem.out());
  }
  for (const Dtype weights : {Dtype::kQ8_0, Dtype::kBF16}) {
    EXPECT_FALSE(mla_rounds(weights, Activations::kExact));
    EXPECT_EQ(mla_rounds(weights, Activations::kRounded), isa() == Isa::kAvx512 && fast_bf16_products());
  }
}

INSTANTIATE_TEST_SUITE_P(IsaCache, MlaRounded, mla_testing::isas_and_caches(), mla_testing::isa_and_cache);

}  // namespace
}  // namespace kilin
