// SPDX-License-Identifier: Apache-2.0
#include "eval/tasks.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "eval/perplexity.h"

namespace kilin::eval {
namespace {

using Ids = std::span<const int32_t>;

double log_likelihood(LogitSource& source, std::span<const float> first, Ids continuation) {
  double sum = -negative_log_likelihood(first, continuation.front());
  const auto vocab = static_cast<size_t>(source.vocab_size());
  const auto piece = static_cast<size_t>(piece_length(source.vocab_size()));
  const Ids inputs = continuation.first(continuation.size() - 1);  // nothing is predicted after the last
  for (size_t begin = 0; begin < inputs.size(); begin += piece) {
    const Ids part = inputs.subspan(begin, std::min(piece, inputs.size() - begin));
    const auto logits = source.append(part);
    for (size_t i = 0; i < part.size(); ++i) {
      sum -=
          negative_log_likelihood(std::span(logits).subspan(i * vocab, vocab), continuation[begin + i + 1]);
    }
  }
  return sum;
}

int32_t largest(std::span<const double> values) {
  return static_cast<int32_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

// f() with errors that say which record they are of.
template <class F>
auto at_place(const std::string& place, const F& f) {
  try {
    return f();
  } catch (const Error& error) {
    fail("{}: {}", place, error.what());
  }
}

struct ExampleScore {
  int64_t right = 0, labels = 0;
  double loss = 0;
};

ExampleScore score_example(LogitSource& source, Ids tokens, Ids labels) {
  const auto vocab = static_cast<size_t>(source.vocab_size());
  const auto piece = static_cast<size_t>(piece_length(source.vocab_size()));
  ExampleScore score;
  source.start();
  for (size_t begin = 0; begin < tokens.size(); begin += piece) {
    const Ids part = tokens.subspan(begin, std::min(piece, tokens.size() - begin));
    const auto logits = source.append(part);
    for (size_t i = 0; i < part.size(); ++i) {
      const int32_t label = labels[begin + i];
      if (label == kNotCounted) continue;
      const auto row = std::span(logits).subspan(i * vocab, vocab);
      const auto best = std::max_element(row.begin(), row.end()) - row.begin();
      score.right += best == label ? 1 : 0;
      score.labels += 1;
      score.loss += negative_log_likelihood(row, label);
    }
  }
  return score;
}

}  // namespace

std::vector<double> log_likelihoods(LogitSource& source, Ids context,
                                    std::span<const std::vector<int32_t>> continuations) {
  check(!context.empty(), "found no token before the answer, expected at least one");
  source.start();
  const std::vector<float> first = source.append_last(context);
  source.mark();
  std::vector<double> result;
  bool moved = false;
  for (const auto& continuation : continuations) {
    check(!continuation.empty(), "answer {}: found no token, expected at least one", result.size());
    if (moved) source.rewind();
    moved = continuation.size() > 1;
    result.push_back(log_likelihood(source, first, continuation));
    check(std::isfinite(result.back()), "the model's logits are not finite");
  }
  return result;
}

ChoiceResult answer_choices(LogitSource& source, std::span<const Question> questions,
                            const TaskProgress& progress) {
  ChoiceResult result;
  for (const Question& q : questions) {
    auto values = at_place(q.place, [&] { return log_likelihoods(source, q.context, q.continuations); });
    result.predicted.push_back(largest(values));
    if (!q.lengths.empty()) {
      std::vector<double> per_byte(values);
      for (size_t i = 0; i < per_byte.size(); ++i) per_byte[i] /= q.lengths[i];
      result.predicted_normalized.push_back(largest(per_byte));
    }
    result.log_likelihoods.push_back(std::move(values));
    if (progress && !progress(static_cast<int64_t>(result.predicted.size()))) break;
  }
  return result;
}

Mean accuracy_of(std::span<const Question> questions, std::span<const int32_t> predictions) {
  std::vector<double> right;
  for (size_t i = 0; i < predictions.size(); ++i)
    right.push_back(questions[i].right == predictions[i] ? 1 : 0);
  return mean_of(right);
}

std::vector<std::vector<int32_t>> answer_freely(Generator& generator, std::span<const Question> questions,
                                                int64_t max_tokens, int64_t batch,
                                                const TaskProgress& progress) {
  KILIN_ASSERT(batch >= 1);
  std::vector<std::vector<int32_t>> texts;
  while (texts.size() < questions.size()) {
    const auto part = questions.subspan(
        texts.size(), std::min(static_cast<size_t>(batch), questions.size() - texts.size()));
    std::vector<std::vector<int32_t>> prompts;
    for (const Question& q : part) {
      check(!q.context.empty(), "{}: found no token before the answer, expected at least one", q.place);
      prompts.push_back(q.context);
    }
    const std::string place = part.size() == 1
                                  ? part.front().place
                                  : fmt::format("{} to {}", part.front().place, part.back().place);
    for (auto& text : at_place(place, [&] { return generator.generate(prompts, max_tokens); })) {
      texts.push_back(std::move(text));
    }
    if (progress && !progress(static_cast<int64_t>(texts.size()))) break;
  }
  return texts;
}

SyntheticScore score_synthetic(LogitSource& source, const SyntheticTask& task, Split split, uint64_t first,
                               int64_t count, const TaskProgress& progress) {
  check(source.vocab_size() >= task.config().vocabulary,
        "vocabulary: found {}, expected at most the {} tokens of the model", task.config().vocabulary,
        source.vocab_size());
  std::vector<double> accuracies, exact;
  SyntheticScore score;
  for (int64_t i = 0; i < count; ++i) {
    const SyntheticExample e = task.example(split, first + static_cast<uint64_t>(i));
    const ExampleScore one = score_example(source, e.tokens, e.labels);
    check(std::isfinite(one.loss), "example {}: the model's logits are not finite",
          first + static_cast<uint64_t>(i));
    accuracies.push_back(static_cast<double>(one.right) / static_cast<double>(one.labels));
    exact.push_back(one.right == one.labels ? 1 : 0);
    score.labels += one.labels;
    score.loss += one.loss;
    if (progress && !progress(i + 1)) break;
  }
  score.examples = static_cast<int64_t>(exact.size());
  if (score.labels > 0) score.loss /= static_cast<double>(score.labels);
  score.accuracy = mean_of(accuracies);
  score.exact = mean_of(exact);
  return score;
}

}  // namespace kilin::eval
