// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace kilin {

// Finds stop texts in a stream: text that may be the beginning of one is held back until that is decided.
class StopScanner {
 public:
  explicit StopScanner(std::vector<std::string> stops);  // empty texts are an Error

  // Takes the next piece and returns what is safe to print. After a stop text was found, stopped() holds and
  // nothing more is returned; the stop text itself and what follows is dropped.
  std::string push(std::string_view piece);
  // What was held back, at the end of the stream.
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  size_t held_length() const;

  std::vector<std::string> stops_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace kilin
