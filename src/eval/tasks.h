// SPDX-License-Identifier: Apache-2.0
// The evaluations by task: from records or examples to what the model answered, and the scores of that.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/logit_source.h"
#include "eval/records.h"
#include "eval/scores.h"
#include "eval/synthetic.h"

namespace kilin::eval {

// Hears how many records or examples are done; false stops, and the result covers those.
using TaskProgress = std::function<bool(int64_t done)>;

// log p(continuation | context) of each continuation, in nats: the sum over its tokens. The context (at least
// one token) is read once. Throws Error for an empty context or continuation and for logits that are not
// finite.
std::vector<double> log_likelihoods(LogitSource& source, std::span<const int32_t> context,
                                    std::span<const std::vector<int32_t>> continuations);

// A record as tokens.
struct Question {
  std::string place;  // "FILE:LINE", for errors
  std::vector<int32_t> context;
  std::vector<std::vector<int32_t>>
      continuations;            // classification: one of each label; choice: of each choice
  std::vector<double> lengths;  // choice: bytes of each choice's text
  int32_t right = 0;            // index into continuations
};

struct ChoiceResult {
  std::vector<std::vector<double>> log_likelihoods;  // [questions][continuations]
  std::vector<int32_t> predicted;                    // by log-likelihood; of equal ones the first
  std::vector<int32_t> predicted_normalized;         // by log-likelihood per byte, where there are lengths
};
ChoiceResult answer_choices(LogitSource& source, std::span<const Question> questions,
                            const TaskProgress& progress);

// Accuracy by predictions, over the questions that were answered.
Mean accuracy_of(std::span<const Question> questions, std::span<const int32_t> predictions);

// Texts that `generator` makes, in batches of `batch` prompts.
std::vector<std::vector<int32_t>> answer_freely(Generator& generator, std::span<const Question> questions,
                                                int64_t max_tokens, int64_t batch,
                                                const TaskProgress& progress);

struct SyntheticScore {
  Mean accuracy;    // share of right labels; its error over examples
  Mean exact;       // share of examples with every label right
  double loss = 0;  // mean negative log-likelihood of the labels, nats
  int64_t examples = 0;
  int64_t labels = 0;
};
// Examples first to first + count - 1 of a split; the prediction is the most likely token of the whole
// vocabulary. Throws Error when the source's vocabulary is smaller than the task's.
SyntheticScore score_synthetic(LogitSource& source, const SyntheticTask& task, Split split, uint64_t first,
                               int64_t count, const TaskProgress& progress);

}  // namespace kilin::eval
