// SPDX-License-Identifier: Apache-2.0
#include "eval/scores.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/random.h"

namespace kilin::eval {
namespace {

constexpr int kResamples = 1000;

struct Counts {
  std::vector<int64_t> hits, support, predicted;  // by class

  explicit Counts(size_t classes) : hits(classes, 0), support(classes, 0), predicted(classes, 0) {}
  void add(int32_t label, int32_t prediction) {
    ++support[static_cast<size_t>(label)];
    ++predicted[static_cast<size_t>(prediction)];
    if (label == prediction) ++hits[static_cast<size_t>(label)];
  }
  // 2 hits / (support + predicted) is the harmonic mean of precision and recall
  double f1(size_t i) const {
    return support[i] + predicted[i] == 0
               ? 0
               : 2 * static_cast<double>(hits[i]) / static_cast<double>(support[i] + predicted[i]);
  }
  double macro_f1() const {
    double sum = 0;
    int present = 0;
    for (size_t i = 0; i < hits.size(); ++i) {
      if (support[i] + predicted[i] == 0) continue;
      sum += f1(i);
      ++present;
    }
    return present == 0 ? 0 : sum / present;
  }
};

double ratio(int64_t part, int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

double bootstrap_deviation(std::span<const int32_t> labels, std::span<const int32_t> predictions,
                           size_t classes) {
  Random random(0);
  std::vector<double> values(kResamples);
  for (double& value : values) {
    Counts counts(classes);
    for (size_t i = 0; i < labels.size(); ++i) {
      const size_t pick = random.below(labels.size());
      counts.add(labels[pick], predictions[pick]);
    }
    value = counts.macro_f1();
  }
  return mean_of(values).standard_error * std::sqrt(static_cast<double>(kResamples));
}

bool is_punctuation(char c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

std::vector<std::string> answer_words(std::string_view text) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    if (is_space(c)) {
      words.emplace_back();
    } else if (!is_punctuation(c)) {
      words.back() += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    }
  }
  std::erase_if(words, [](const std::string& w) { return w.empty() || w == "a" || w == "an" || w == "the"; });
  return words;
}

double word_f1(const std::vector<std::string>& predicted, const std::vector<std::string>& answer) {
  std::map<std::string, int64_t> left;
  for (const std::string& word : answer) ++left[word];
  int64_t common = 0;
  for (const std::string& word : predicted) {
    const auto at = left.find(word);
    if (at == left.end() || at->second == 0) continue;
    --at->second;
    ++common;
  }
  return ratio(2 * common, static_cast<int64_t>(predicted.size() + answer.size()));
}

}  // namespace

Mean mean_of(std::span<const double> values) {
  if (values.empty()) return {};
  const auto n = static_cast<double>(values.size());
  Mean mean;
  mean.value = std::accumulate(values.begin(), values.end(), 0.0) / n;
  if (values.size() < 2) return mean;
  double squares = 0;
  for (const double x : values) squares += (x - mean.value) * (x - mean.value);
  mean.standard_error = std::sqrt(squares / (n - 1) / n);
  return mean;
}

ClassificationScore score_classes(std::span<const int32_t> labels, std::span<const int32_t> predictions,
                                  int32_t classes) {
  KILIN_ASSERT(labels.size() == predictions.size() && !labels.empty());
  Counts counts(static_cast<size_t>(classes));
  std::vector<double> right;
  for (size_t i = 0; i < labels.size(); ++i) {
    counts.add(labels[i], predictions[i]);
    right.push_back(labels[i] == predictions[i] ? 1 : 0);
  }
  ClassificationScore score;
  score.accuracy = mean_of(right);
  score.macro_f1 = {counts.macro_f1(),
                    bootstrap_deviation(labels, predictions, static_cast<size_t>(classes))};
  for (size_t i = 0; i < static_cast<size_t>(classes); ++i) {
    score.classes.push_back({ratio(counts.hits[i], counts.predicted[i]),
                             ratio(counts.hits[i], counts.support[i]), counts.f1(i), counts.support[i],
                             counts.predicted[i]});
  }
  return score;
}

std::string normalized_answer(std::string_view text) {
  return fmt::format("{}", fmt::join(answer_words(text), " "));
}

AnswerScore score_answer(std::string_view predicted, std::span<const std::string> answers) {
  const auto words = answer_words(predicted);
  AnswerScore best;
  for (const std::string& answer : answers) {
    const auto expected = answer_words(answer);
    best.exact = std::max(best.exact, words == expected ? 1.0 : 0.0);
    best.f1 = std::max(best.f1, word_f1(words, expected));
  }
  return best;
}

}  // namespace kilin::eval
