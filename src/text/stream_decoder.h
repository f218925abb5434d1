// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>

#include "text/tokenizer.h"

namespace kilin::text {

// Turns ids into text one at a time: every string is valid UTF-8 and together they are
// lossy_utf8(decode(ids)). Bytes that may be the beginning of a character are kept until the next token, or
// flush, decides.
class StreamDecoder {
 public:
  // The tokenizer must outlive the decoder.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  std::string push(int32_t id);
  std::string flush();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace kilin::text
