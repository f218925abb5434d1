// SPDX-License-Identifier: Apache-2.0
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "base/error.h"

namespace kilin {
namespace {

std::array<int, 4> counts(const SamplingOptions& options, const std::vector<float>& logits,
                          int draws = 20000) {
  TokenSampler sampler(options);
  std::array<int, 4> n{};
  for (int i = 0; i < draws; ++i) ++n[static_cast<size_t>(sampler.sample(logits))];
  return n;
}

const std::vector<float> kLogits{std::log(0.4f), std::log(0.3f), std::log(0.2f), std::log(0.1f)};

TEST(Sampler, greedy_takes_the_first_of_the_largest) {
  EXPECT_EQ(TokenSampler({}).sample(std::vector<float>{1, 3, 3, 2}), 1);
}

TEST(Sampler, draws_follow_the_distribution) {
  const auto n = counts({.temperature = 1.0, .seed = 1}, kLogits);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(n[i] / 20000.0, std::exp(kLogits[i]), 0.015);
}

TEST(Sampler, temperature_sharpens_and_flattens) {
  const auto cold = counts({.temperature = 0.5, .seed = 2}, kLogits);  // p^2: 16 : 9 : 4 : 1
  EXPECT_NEAR(cold[0] / 20000.0, 16.0 / 30, 0.015);
  EXPECT_NEAR(cold[3] / 20000.0, 1.0 / 30, 0.015);
}

TEST(Sampler, top_k_keeps_the_k_most_likely) {
  const auto n = counts({.temperature = 1.0, .top_k = 2, .seed = 3}, kLogits);
  EXPECT_EQ(n[2] + n[3], 0);
  EXPECT_NEAR(n[0] / 20000.0, 4.0 / 7, 0.015);
}

TEST(Sampler, top_p_keeps_the_fewest_that_reach_p) {
  auto n = counts({.temperature = 1.0, .top_p = 0.65, .seed = 4}, kLogits);
  EXPECT_GT(n[1], 0);
  EXPECT_EQ(n[2] + n[3], 0);
  n = counts({.temperature = 1.0, .top_p = 0.75, .seed = 4}, kLogits);
  EXPECT_GT(n[2], 0);
  EXPECT_EQ(n[3], 0);
  n = counts({.temperature = 1.0, .top_p = 1e-9, .seed = 4}, kLogits);
  EXPECT_EQ(n[0], 20000);
}

TEST(Sampler, min_p_is_relative_to_the_most_likely) {
  const auto n = counts({.temperature = 1.0, .min_p = 0.45, .seed = 5}, kLogits);  // keeps p >= 0.18
  EXPECT_GT(n[2], 0);
  EXPECT_EQ(n[3], 0);
}

TEST(Sampler, repetition_penalty_lowers_tokens_seen_whatever_their_sign) {
  TokenSampler sampler({.repetition_penalty = 2.0});
  const std::vector<float> logits{3.0f, 2.0f, -1.0f, -1.5f};
  EXPECT_EQ(sampler.sample(logits), 0);
  sampler.accept(0);
  EXPECT_EQ(sampler.sample(logits), 1);  // 1.5 against 2
  TokenSampler negative({.repetition_penalty = 2.0});
  negative.accept(0);
  EXPECT_EQ(negative.sample(std::vector<float>{-1.0f, -1.5f}), 1);  // -2 against -1.5
}

TEST(Sampler, the_same_seed_repeats) {
  EXPECT_EQ(counts({.temperature = 1.0, .seed = 9}, kLogits, 50),
            counts({.temperature = 1.0, .seed = 9}, kLogits, 50));
}

TEST(Sampler, silly_options_are_refused) {
  for (const SamplingOptions& o :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = NAN}, SamplingOptions{.top_k = -1},
        SamplingOptions{.top_p = 0}, SamplingOptions{.top_p = 1.5}, SamplingOptions{.min_p = 2},
        SamplingOptions{.repetition_penalty = 0}}) {
    EXPECT_THROW(TokenSampler{o}, Error);
  }
}

}  // namespace
}  // namespace kilin
