// SPDX-License-Identifier: Apache-2.0
#include "eval/tasks.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "eval/perplexity.h"

namespace kilin::eval {
namespace {

using Ids = std::vector<int32_t>;

// Logits that depend on every token of the text and on their order.
class HashSource : public LogitSource {
 public:
  static constexpr int64_t kVocab = 11;
  static std::vector<float> logits(const Ids& text) {
    uint64_t hash = 1;
    for (const int32_t id : text) hash = (hash + static_cast<uint64_t>(id) + 1) * 0x9e3779b97f4a7c15ull;
    std::vector<float> row;
    for (uint64_t v = 0; v < kVocab; ++v) row.push_back(static_cast<float>((hash >> (5 * v)) % 32) / 4);
    return row;
  }
  int64_t vocab_size() const override { return kVocab; }
  void start() override { text_.clear(); }
  std::vector<float> append(std::span<const int32_t> ids) override {
    std::vector<float> all;
    for (const int32_t id : ids) {
      text_.push_back(id);
      const auto row = logits(text_);
      all.insert(all.end(), row.begin(), row.end());
      ++fed;
    }
    return all;
  }
  void mark() override { marked_ = text_; }
  void rewind() override { text_ = marked_; }

  int fed = 0;

 private:
  Ids text_, marked_;
};

double plain(Ids text, const Ids& continuation) {
  double sum = 0;
  for (const int32_t id : continuation) {
    const auto row = HashSource::logits(text);
    double total = 0;
    for (const float x : row) total += std::exp(static_cast<double>(x));
    sum += static_cast<double>(row[static_cast<size_t>(id)]) - std::log(total);
    text.push_back(id);
  }
  return sum;
}

TEST(LogLikelihoods, are_those_of_each_text_alone) {
  HashSource source;
  const Ids context{1, 2, 3};
  const std::vector<Ids> continuations{{4, 5, 6}, {4}, {7, 8}, {4, 5, 6}};
  const auto found = log_likelihoods(source, context, continuations);
  ASSERT_EQ(found.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(found[i], plain(context, continuations[i]), 1e-6);
  EXPECT_EQ(found[0], found[3]);
  EXPECT_EQ(source.fed, 3 + 2 + 1 + 2);  // the context once, and no last token
  EXPECT_THROW(log_likelihoods(source, {}, continuations), Error);
  EXPECT_THROW(log_likelihoods(source, context, std::vector<Ids>{{}}), Error);
}

TEST(AnswerChoices, takes_the_likeliest_and_the_likeliest_per_byte) {
  HashSource source;
  std::vector<Question> questions;
  for (int32_t i = 0; i < 20; ++i) {
    questions.push_back({"f:1", {i % 5, i}, {{1}, {2, 3}, {4, 5, 6}}, {1, 5, 20}, i % 3});
  }
  const auto result = answer_choices(source, questions, {});
  double right = 0;
  for (size_t i = 0; i < questions.size(); ++i) {
    int32_t best = 0, best_per_byte = 0;
    std::vector<double> values;
    for (const Ids& c : questions[i].continuations) values.push_back(plain(questions[i].context, c));
    for (int32_t k = 1; k < 3; ++k) {
      const auto at = [&](int32_t j) { return values[static_cast<size_t>(j)]; };
      const auto length = [&](int32_t j) { return questions[i].lengths[static_cast<size_t>(j)]; };
      if (at(k) > at(best)) best = k;
      if (at(k) / length(k) > at(best_per_byte) / length(best_per_byte)) best_per_byte = k;
    }
    EXPECT_EQ(result.predicted[i], best);
    EXPECT_EQ(result.predicted_normalized[i], best_per_byte);
    right += best == questions[i].right ? 1 : 0;
  }
  EXPECT_DOUBLE_EQ(accuracy_of(questions, result.predicted).value, right / 20);
}

TEST(AnswerChoices, stops_when_asked_and_names_the_record) {
  HashSource source;
  const std::vector<Question> questions(3, {"f.jsonl:7", {1}, {{1}, {2}}, {}, 0});
  EXPECT_EQ(answer_choices(source, questions, [](int64_t done) { return done < 2; }).predicted.size(), 2u);
  const std::vector<Question> empty(1, {"f.jsonl:7", {}, {{1}, {2}}, {}, 0});
  try {
    answer_choices(source, empty, {});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "f.jsonl:7: found no token before the answer, expected at least one");
  }
}

class CountingGenerator : public Generator {
 public:
  std::vector<Ids> generate(std::span<const Ids> prompts, int64_t max_tokens) override {
    batches.push_back(prompts.size());
    std::vector<Ids> texts;
    for (const Ids& p : prompts) texts.emplace_back(static_cast<size_t>(max_tokens), p.front());
    return texts;
  }
  std::vector<size_t> batches;
};

TEST(AnswerFreely, goes_through_the_questions_in_batches) {
  std::vector<Question> questions;
  for (int32_t i = 0; i < 7; ++i) questions.push_back({"f:1", {i}, {}, {}, 0});
  CountingGenerator generator;
  const auto texts = answer_freely(generator, questions, 2, 3, {});
  EXPECT_EQ(generator.batches, (std::vector<size_t>{3, 3, 1}));
  ASSERT_EQ(texts.size(), 7u);
  for (int32_t i = 0; i < 7; ++i) EXPECT_EQ(texts[static_cast<size_t>(i)], (Ids{i, i}));
  EXPECT_EQ(answer_freely(generator, questions, 2, 3, [](int64_t) { return false; }).size(), 3u);
}

// Reads the examples of one task and answers by `solve`, given the tokens so far.
class SolvingSource : public LogitSource {
 public:
  SolvingSource(int64_t vocab, std::function<int32_t(const Ids&)> solve)
      : vocab_(vocab), solve_(std::move(solve)) {}
  int64_t vocab_size() const override { return vocab_; }
  void start() override { text_.clear(); }
  std::vector<float> append(std::span<const int32_t> ids) override {
    std::vector<float> all(ids.size() * static_cast<size_t>(vocab_), 0);
    for (size_t i = 0; i < ids.size(); ++i) {
      text_.push_back(ids[i]);
      const int32_t answer = solve_(text_);
      if (answer >= 0) all[i * static_cast<size_t>(vocab_) + static_cast<size_t>(answer)] = 3;
    }
    return all;
  }
  void mark() override {}
  void rewind() override {}

 private:
  int64_t vocab_;
  std::function<int32_t(const Ids&)> solve_;
  Ids text_;
};

SyntheticTask palindromes() {
  SyntheticConfig c;
  c.length = 32;
  c.vocabulary = 20;
  return SyntheticTask(c);
}

TEST(ScoreSynthetic, a_solver_has_all_right) {
  SolvingSource source(24, [](const Ids& text) {
    const auto separator = std::find(text.begin(), text.end(), palindrome::kSeparator);
    if (separator == text.end()) return kNotCounted;
    return *(separator - 1 - (text.end() - 1 - separator));
  });
  const auto score = score_synthetic(source, palindromes(), Split::kHeldOut, 0, 10, {});
  EXPECT_EQ(score.accuracy.value, 1);
  EXPECT_EQ(score.exact.value, 1);
  EXPECT_EQ(score.labels, 160);
  EXPECT_NEAR(score.loss, std::log(std::exp(3.0) + 23) - 3, 1e-6);
}

TEST(ScoreSynthetic, half_a_solver_has_half_right) {
  // Right for the first 8 of 16 answers, then always <sep>, which never is one.
  SolvingSource source(20, [](const Ids& text) {
    const auto separator = std::find(text.begin(), text.end(), palindrome::kSeparator);
    if (separator == text.end()) return kNotCounted;
    const auto done = text.end() - 1 - separator;
    return done < 8 ? *(separator - 1 - done) : palindrome::kSeparator;
  });
  int64_t heard = 0;
  const auto score = score_synthetic(source, palindromes(), Split::kTrain, 5, 9, [&](int64_t done) {
    heard = done;
    return done < 6;
  });
  EXPECT_EQ(heard, 6);
  EXPECT_EQ(score.examples, 6);
  EXPECT_EQ(score.accuracy.value, 0.5);
  EXPECT_EQ(score.accuracy.standard_error, 0);
  EXPECT_EQ(score.exact.value, 0);
  SolvingSource small(19, [](const Ids&) { return 0; });
  EXPECT_THROW(score_synthetic(small, palindromes(), Split::kTrain, 0, 1, {}), Error);
}

}  // namespace
}  // namespace kilin::eval
