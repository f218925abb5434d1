// SPDX-License-Identifier: Apache-2.0
#include "kilin/chat_session.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace kilin::cli {

ChatSession::ChatSession(Model model, std::string system, GenerateOptions options)
    : model_(std::move(model)),
      system_(std::move(system)),
      options_(std::move(options)),
      sequence_(model_.new_sequence()) {
  check(model_.has_chat_template(),
        "{}: found no chat template (chat_template.jinja or tokenizer_config.json)", model_.info().path);
  reset();
}

void ChatSession::reset() {
  messages_.clear();
  if (!system_.empty()) messages_.push_back({"system", system_});
}

void ChatSession::set_system(std::string system) {
  system_ = std::move(system);
  reset();
}

std::vector<int32_t> ChatSession::tokens_to_feed(const std::vector<int32_t>& rendered) {
  const bool extends =
      known_.size() < rendered.size() && std::equal(known_.begin(), known_.end(), rendered.begin());
  if (!extends) {  // the template rewrote the past, or the answer's text encodes to other tokens
    sequence_.clear();
    known_.clear();
  }
  return {rendered.begin() + static_cast<std::ptrdiff_t>(known_.size()), rendered.end()};
}

GenerateResult ChatSession::answer(const std::string& user) {
  std::vector<ChatMessage> messages = messages_;
  messages.push_back({"user", user});
  const std::vector<int32_t> rendered = model_.encode(model_.chat_prompt(messages));
  const auto room = model_.info().max_length - static_cast<int64_t>(rendered.size());
  check(room > 0, "the conversation has {} tokens, the model takes {}: /reset begins a new one",
        rendered.size(), model_.info().max_length);
  GenerateOptions options = options_;
  options.max_tokens = std::min(options.max_tokens, room);
  options.seen = rendered;            // the whole conversation, however much of it is fed anew
  options.sampling.seed += answers_;  // the same question twice may get two answers
  const auto feed = tokens_to_feed(rendered);
  fed_ = static_cast<int64_t>(feed.size());
  GenerateResult result;
  try {
    result = model_.generate(sequence_, feed, options);
  } catch (...) {
    sequence_.clear();
    known_.clear();
    throw;
  }
  // The last generated token need not have been fed: the sequence's length tells.
  known_ = rendered;
  known_.insert(known_.end(), result.ids.begin(), result.ids.end());
  known_.resize(std::min(known_.size(), static_cast<size_t>(sequence_.length())));
  if (result.ids.empty()) return result;  // stopped before an answer: as if nobody had asked
  messages.push_back({"assistant", result.text});
  messages_ = std::move(messages);
  answers_ += 1;
  return result;
}

}  // namespace kilin::cli
