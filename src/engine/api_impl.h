// SPDX-License-Identifier: Apache-2.0
// What the public classes of kilin/kilin.h hold.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"
#include "kilin/kilin.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace kilin {

struct Model::Impl {
  Impl(LoadedModel loaded, const ModelOptions& model_options);

  ModelOptions options;
  ModelInfo info;
  std::optional<text::Tokenizer> tokenizer;
  std::optional<text::ChatTemplate> chat_template;
  std::vector<int32_t> end_ids;
  std::mutex mutex;  // one computation at a time
  Engine engine;

  const text::Tokenizer& need_tokenizer() const;
  void check_tokens(std::span<const int32_t> tokens, int64_t past) const;
};

struct Sequence::Impl {
  explicit Impl(std::shared_ptr<Model::Impl> owner);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // Computes under the model's lock; if that fails, every sequence of `moved` is cleared.
  static std::span<const float> forward(const Batch& batch, std::span<Impl* const> moved);
  std::span<const float> forward(std::span<const int32_t> tokens, bool all_logits);
  void clear();

  std::shared_ptr<Model::Impl> model;
  int32_t slot = 0;
  int64_t length = 0;
  std::vector<float> logits;
};

struct Sampler::Impl {
  TokenSampler sampler;
};

}  // namespace kilin
