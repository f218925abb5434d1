// SPDX-License-Identifier: Apache-2.0
#include "text/stream_decoder.h"

#include "text/utf8.h"

namespace kilin::text {

std::string StreamDecoder::push(int32_t id) {
  const std::string_view token = tokenizer_->token_bytes(id);
  if (skip_special_ && tokenizer_->is_special(id)) return {};
  const std::string bytes = pending_.append(token);
  std::string text;
  std::string_view rest = bytes;
  pending_.clear();
  while (!rest.empty()) {
    const Utf8Step step = next_utf8(rest);
    if (step.kind == Utf8Kind::kIncomplete) {
      pending_ = rest;
      break;
    }
    text += step.kind == Utf8Kind::kValid ? rest.substr(0, step.length) : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  return text;
}

std::string StreamDecoder::flush() {
  std::string text = lossy_utf8(pending_);
  pending_.clear();
  return text;
}

}  // namespace kilin::text
