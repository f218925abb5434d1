// SPDX-License-Identifier: Apache-2.0
// What an evaluation needs of a model. The engine, a server over the network or a fake in a test can stand
// behind it.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace kilin::eval {

class LogitSource {
 public:
  virtual ~LogitSource() = default;

  virtual int64_t vocab_size() const = 0;
  // Forgets everything: the next append() begins a new text.
  virtual void start() = 0;
  // Appends tokens to the text and returns the logits after each of them, [ids.size()][vocab_size()].
  virtual std::vector<float> append(std::span<const int32_t> ids) = 0;
  // Appends tokens (at least one) and returns the logits after the last of them, [vocab_size()].
  virtual std::vector<float> append_last(std::span<const int32_t> ids) {
    const std::vector<float> all = append(ids);
    return {all.end() - static_cast<std::ptrdiff_t>(vocab_size()), all.end()};
  }
  // Remembers the text so far; rewind() goes back to it, as often as asked, until the next mark() or start().
  virtual void mark() = 0;
  virtual void rewind() = 0;
};

// Greedy texts.
class Generator {
 public:
  virtual ~Generator() = default;

  // The most likely tokens behind each prompt, up to and without an end token, at most max_tokens.
  virtual std::vector<std::vector<int32_t>> generate(std::span<const std::vector<int32_t>> prompts,
                                                     int64_t max_tokens) = 0;
};

// Logits of a large vocabulary are big (163,840 x 512 tokens are 320 MiB), so long texts go in pieces of so
// many tokens.
int64_t piece_length(int64_t vocab_size);

}  // namespace kilin::eval
