// SPDX-License-Identifier: Apache-2.0
// How answers are counted.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::eval {

struct Mean {
  double value = 0;
  double standard_error = 0;  // sample deviation / sqrt(n); 0 for fewer than two values
};
Mean mean_of(std::span<const double> values);

struct ClassScore {
  double precision = 0, recall = 0, f1 = 0;  // 0 where there is nothing to divide by
  int64_t support = 0;                       // records whose label it is
  int64_t predicted = 0;
};

struct ClassificationScore {
  Mean accuracy;
  // Mean F1 of the classes that are someone's label or prediction. Its error is the deviation over 1000
  // resamples of the records (bootstrap, with a fixed seed).
  Mean macro_f1;
  std::vector<ClassScore> classes;  // of every class, in order
};
// labels and predictions are class numbers from 0 to classes - 1, at least one.
ClassificationScore score_classes(std::span<const int32_t> labels, std::span<const int32_t> predictions,
                                  int32_t classes);

// As SQuAD's evaluation script 1.1 (Rajpurkar et al. 2016): lower case, without punctuation and the words a,
// an and the, white space made one. Letters outside ASCII stay as they are.
std::string normalized_answer(std::string_view text);

struct AnswerScore {
  double exact = 0;  // 1: equal to an answer once both are normalized
  double f1 = 0;     // of the words, the best over the answers
};
AnswerScore score_answer(std::string_view predicted, std::span<const std::string> answers);

}  // namespace kilin::eval
