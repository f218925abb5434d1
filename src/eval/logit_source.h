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
};

}  // namespace kilin::eval
