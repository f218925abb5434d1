// SPDX-License-Identifier: Apache-2.0
#include "kilin/model_source.h"

#include <algorithm>

namespace kilin::cli {

void ModelSource::start() {
  sequence_.clear();
  marked_.reset();
}

std::vector<float> ModelSource::append(std::span<const int32_t> ids) {
  return sequence_.prefill_all_logits(ids);
}

std::vector<float> ModelSource::append_last(std::span<const int32_t> ids) {
  sequence_.prefill(ids);
  const auto logits = sequence_.logits();
  return {logits.begin(), logits.end()};
}

std::vector<std::vector<int32_t>> ModelGenerator::generate(std::span<const std::vector<int32_t>> prompts,
                                                           int64_t max_tokens) {
  const auto& ends = model_.end_ids();
  std::vector<Sequence> sequences;
  sequences.reserve(prompts.size());
  for (const auto& prompt : prompts) {
    sequences.push_back(model_.new_sequence());
    sequences.back().prefill(prompt);
  }
  std::vector<std::vector<int32_t>> texts(prompts.size());
  std::vector<size_t> open(prompts.size());
  for (size_t i = 0; i < open.size(); ++i) open[i] = i;
  Sampler greedy;
  while (!open.empty()) {
    std::vector<Sequence*> going;
    std::vector<int32_t> tokens;
    std::vector<size_t> still;
    for (const size_t i : open) {
      const int32_t id = greedy.sample(sequences[i].logits());
      if (std::find(ends.begin(), ends.end(), id) != ends.end()) continue;
      texts[i].push_back(id);
      if (static_cast<int64_t>(texts[i].size()) == max_tokens || stopped(texts[i])) continue;
      going.push_back(&sequences[i]);
      tokens.push_back(id);
      still.push_back(i);
    }
    model_.decode(going, tokens);
    open = std::move(still);
  }
  return texts;
}

size_t ModelGenerator::stop_at(const std::string& text) const {
  size_t first = std::string::npos;
  for (const std::string& stop : stop_) first = std::min(first, text.find(stop));
  return first;
}

bool ModelGenerator::stopped(const std::vector<int32_t>& ids) const {
  return !stop_.empty() && stop_at(model_.decode_text(ids)) != std::string::npos;
}

std::string ModelGenerator::text_of(const std::vector<int32_t>& ids) const {
  const std::string text = model_.decode_text(ids);
  return text.substr(0, stop_at(text));
}

bool begins_with_special(const Model& model, const std::vector<int32_t>& ids) {
  if (ids.empty()) return false;
  const auto first = std::span(ids).first(1);
  return model.decode_text(first, true).empty() && !model.decode_text(first, false).empty();
}

}  // namespace kilin::cli
