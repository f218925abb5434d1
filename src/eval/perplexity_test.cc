// SPDX-License-Identifier: Apache-2.0
#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace kilin::eval {
namespace {

// Gives the token after x, (x + 1) mod vocabulary, the probability p and shares the rest evenly: predicting
// a counting sequence has perplexity 1 / p. Adds a constant to all logits, which must not matter.
class CountingSource : public LogitSource {
 public:
  CountingSource(int64_t vocab_size, double p, float shift = 0) : vocab_(vocab_size), p_(p), shift_(shift) {}

  int64_t vocab_size() const override { return vocab_; }
  void start() override { starts += 1; }
  void mark() override {}
  void rewind() override {}
  std::vector<float> append(std::span<const int32_t> ids) override {
    largest_piece = std::max(largest_piece, ids.size());
    fed += static_cast<int64_t>(ids.size());
    const double rest = (1 - p_) / static_cast<double>(vocab_ - 1);
    std::vector<float> logits(ids.size() * static_cast<size_t>(vocab_),
                              static_cast<float>(std::log(rest)) + shift_);
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto next = static_cast<size_t>((ids[i] + 1) % vocab_);
      logits[i * static_cast<size_t>(vocab_) + next] = static_cast<float>(std::log(p_)) + shift_;
    }
    return logits;
  }

  int starts = 0;
  int64_t fed = 0;
  size_t largest_piece = 0;

 private:
  int64_t vocab_;
  double p_;
  float shift_;
};

std::vector<int32_t> counting(int64_t length, int32_t vocab_size) {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < length; ++i) ids.push_back(i % vocab_size);
  return ids;
}

TEST(NegativeLogLikelihood, OfUniformLogitsIsLogOfTheVocabulary) {
  const std::vector<float> logits(1000, 3.0f);
  EXPECT_NEAR(negative_log_likelihood(logits, 7), std::log(1000.0), 1e-12);
}

TEST(NegativeLogLikelihood, IsThatOfDoubles) {
  std::vector<float> logits;
  for (int i = 0; i < 5000; ++i) logits.push_back(20.0f * std::sin(static_cast<float>(i * i)));
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  for (const int token : {0, 1, 4999}) {
    EXPECT_NEAR(negative_log_likelihood(logits, token),
                std::log(sum) - static_cast<double>(logits[static_cast<size_t>(token)]), 1e-6);
  }
}

TEST(NegativeLogLikelihood, DoesNotOverflow) {
  const std::vector<float> logits{1e30f, 0.0f, -1e30f};
  EXPECT_EQ(negative_log_likelihood(logits, 0), 0.0);
  EXPECT_NEAR(negative_log_likelihood(logits, 1), 1e30, 1e23);
}

TEST(NegativeLogLikelihood, TakesImpossibleTokens) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> logits{0.0f, -infinity};
  EXPECT_EQ(negative_log_likelihood(logits, 0), 0.0);
  EXPECT_EQ(negative_log_likelihood(logits, 1), std::numeric_limits<double>::infinity());
}

TEST(CutWindows, LeavesOutTheLastPartialWindow) {
  const auto ids = counting(11, 100);
  const auto windows = cut_windows(ids, 4);
  ASSERT_EQ(windows.size(), 2u);
  EXPECT_EQ(windows[1].front(), 4);
  EXPECT_EQ(windows[1].back(), 7);
  EXPECT_EQ(cut_windows(ids, 4, 1).size(), 1u);
  EXPECT_TRUE(cut_windows(ids, 12).empty());
  EXPECT_THROW(cut_windows(ids, 1), Error);
}

TEST(MeasurePerplexity, OfAKnownDistribution) {
  for (const float shift : {0.0f, 50.0f, -50.0f}) {
    CountingSource source(16, 0.25, shift);
    const auto ids = counting(64, 16);
    const auto result = measure_perplexity(source, cut_windows(ids, 8));
    EXPECT_NEAR(result.perplexity, 4.0, 4e-5);  // logits near 50 have steps of 4e-6
    EXPECT_NEAR(result.loss, std::log(4.0), 1e-5);
    EXPECT_EQ(result.tokens, 8 * 7);
    EXPECT_EQ(result.windows, 8);
    EXPECT_EQ(source.starts, 8);
  }
}

TEST(MeasurePerplexity, WeighsTokensNotWindows) {
  CountingSource source(4, 0.5);
  const std::vector<int32_t> good{0, 1, 2, 3, 0, 1};
  const std::vector<int32_t> bad{0, 0};
  const std::vector<Window> windows{good, bad};
  const double expected = (5 * std::log(2.0) + std::log(6.0)) / 6;
  EXPECT_NEAR(measure_perplexity(source, windows).loss, expected, 1e-6);
}

TEST(MeasurePerplexity, FeedsLongWindowsInPieces) {
  CountingSource source(16, 0.25);
  const auto ids = counting(5000, 16);
  const std::vector<Window> windows{ids};
  const auto result = measure_perplexity(source, windows);
  EXPECT_NEAR(result.perplexity, 4.0, 1e-5);
  EXPECT_EQ(result.tokens, 4999);
  EXPECT_EQ(source.fed, 4999);
  EXPECT_LE(source.largest_piece, 512u);
  EXPECT_EQ(measure_perplexity(source, windows, {}, 3).loss, result.loss);
}

TEST(MeasurePerplexity, StopsWhenAsked) {
  CountingSource source(16, 0.25);
  const auto ids = counting(64, 16);
  const auto result =
      measure_perplexity(source, cut_windows(ids, 8), [](int64_t tokens) { return tokens <= 14; });
  EXPECT_EQ(result.windows, 2);
  EXPECT_NEAR(result.perplexity, 4.0, 1e-5);
}

TEST(MeasurePerplexity, RefusesBadWindows) {
  CountingSource source(16, 0.25);
  const std::vector<int32_t> one{3};
  const std::vector<int32_t> outside{3, 16};
  const std::vector<int32_t> negative{-1, 3};
  EXPECT_THROW(measure_perplexity(source, {}), Error);
  for (const auto& ids : {one, outside, negative}) {
    const std::vector<Window> windows{ids};
    EXPECT_THROW(measure_perplexity(source, windows), Error);
  }
}

TEST(MeasurePerplexity, RefusesLogitsThatAreNotFinite) {
  CountingSource source(16, std::numeric_limits<double>::quiet_NaN());
  const auto ids = counting(8, 16);
  const std::vector<Window> windows{ids};
  EXPECT_THROW(measure_perplexity(source, windows), Error);
}

}  // namespace
}  // namespace kilin::eval
