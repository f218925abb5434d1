// SPDX-License-Identifier: Apache-2.0
#include "eval/scores.h"

#include <gtest/gtest.h>

#include <cmath>

namespace kilin::eval {
namespace {

using Classes = std::vector<int32_t>;
using Texts = std::vector<std::string>;

TEST(Scores, mean_and_its_error) {
  const std::vector<double> values{1, 0, 0, 1, 1};
  const Mean mean = mean_of(values);
  EXPECT_DOUBLE_EQ(mean.value, 0.6);
  EXPECT_DOUBLE_EQ(mean.standard_error, std::sqrt(0.6 * 0.4 / 4));
  EXPECT_EQ(mean_of(std::vector<double>{3}).standard_error, 0);
  EXPECT_EQ(mean_of({}).value, 0);
}

// The figures are those of sklearn.metrics.precision_recall_fscore_support by hand.
TEST(Scores, classes) {
  const Classes labels{0, 0, 0, 1, 1, 2};
  const Classes predictions{0, 0, 1, 1, 0, 1};
  const auto score = score_classes(labels, predictions, 4);
  EXPECT_DOUBLE_EQ(score.accuracy.value, 0.5);
  ASSERT_EQ(score.classes.size(), 4u);
  EXPECT_DOUBLE_EQ(score.classes[0].precision, 2.0 / 3);
  EXPECT_DOUBLE_EQ(score.classes[0].recall, 2.0 / 3);
  EXPECT_DOUBLE_EQ(score.classes[0].f1, 2.0 / 3);
  EXPECT_DOUBLE_EQ(score.classes[1].precision, 1.0 / 3);
  EXPECT_DOUBLE_EQ(score.classes[1].recall, 0.5);
  EXPECT_DOUBLE_EQ(score.classes[1].f1, 0.4);
  EXPECT_EQ(score.classes[2].f1, 0);
  EXPECT_EQ(score.classes[2].support, 1);
  // Class 3 is nobody's and does not count.
  EXPECT_DOUBLE_EQ(score.macro_f1.value, (2.0 / 3 + 0.4 + 0) / 3);
}

TEST(Scores, the_error_of_f1_is_that_of_many_samples) {
  // With two balanced classes and errors alike in both, macro F1 behaves as accuracy: error sqrt(p (1 - p) /
  // n).
  Classes labels, predictions;
  for (int i = 0; i < 400; ++i) {
    labels.push_back(i % 2);
    predictions.push_back(i % 10 < 2 ? 1 - i % 2 : i % 2);
  }
  const auto score = score_classes(labels, predictions, 2);
  EXPECT_NEAR(score.macro_f1.value, 0.8, 1e-9);
  EXPECT_NEAR(score.macro_f1.standard_error, 0.02, 0.002);
  EXPECT_EQ(score_classes(labels, labels, 2).macro_f1.standard_error, 0);
}

TEST(Scores, answers_are_normalized_as_in_squad) {
  EXPECT_EQ(normalized_answer("  The  quick, brown\tFox's (A) an-other\n"), "quick brown foxs another");
  EXPECT_EQ(normalized_answer("É a"), "É");
  EXPECT_EQ(normalized_answer("the"), "");
}

TEST(Scores, answers) {
  const auto score = [](const char* predicted, const Texts& answers) {
    return score_answer(predicted, answers);
  };
  EXPECT_EQ(score("The terminal.", {"a Terminal"}).exact, 1);
  EXPECT_EQ(score("The terminal.", {"a Terminal"}).f1, 1);
  // predicted 4 words, answer 3, common 2 ("x" only once): 2 * 2 / 7
  EXPECT_DOUBLE_EQ(score("x x y z", {"x y w"}).f1, 4.0 / 7);
  EXPECT_EQ(score("x x y z", {"x y w"}).exact, 0);
  EXPECT_EQ(score("b", {"c d", "b"}).exact, 1);
  EXPECT_DOUBLE_EQ(score("c", {"c d", "b"}).f1, 2.0 / 3);
  EXPECT_EQ(score("", {"b"}).f1, 0);
}

}  // namespace
}  // namespace kilin::eval
