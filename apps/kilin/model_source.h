// SPDX-License-Identifier: Apache-2.0
// The engine behind the interfaces of eval/.
#pragma once
#include <kilin/kilin.h>

#include <optional>
#include <string>
#include <vector>

#include "eval/logit_source.h"

namespace kilin::cli {

class ModelSource : public eval::LogitSource {
 public:
  explicit ModelSource(const Model& model)
      : vocab_size_(model.info().vocab_size), sequence_(model.new_sequence()) {}
  int64_t vocab_size() const override { return vocab_size_; }
  void start() override;
  std::vector<float> append(std::span<const int32_t> ids) override;
  std::vector<float> append_last(std::span<const int32_t> ids) override;
  void mark() override { marked_.emplace(sequence_.copy()); }
  void rewind() override { sequence_ = marked_->copy(); }

 private:
  int64_t vocab_size_;
  Sequence sequence_;
  std::optional<Sequence> marked_;
};

// Prompts one by one, then the next tokens of all texts as one batch.
class ModelGenerator : public eval::Generator {
 public:
  // A text also ends once it holds one of `stop`.
  ModelGenerator(const Model& model, std::vector<std::string> stop) : model_(model), stop_(std::move(stop)) {}
  std::vector<std::vector<int32_t>> generate(std::span<const std::vector<int32_t>> prompts,
                                             int64_t max_tokens) override;
  // The text of the tokens up to the first stop text.
  std::string text_of(const std::vector<int32_t>& ids) const;

 private:
  bool stopped(const std::vector<int32_t>& ids) const;
  size_t stop_at(const std::string& text) const;

  const Model& model_;
  std::vector<std::string> stop_;
};

// Whether the first token is one that vanishes from the text when special tokens are skipped.
bool begins_with_special(const Model& model, const std::vector<int32_t>& ids);

}  // namespace kilin::cli
