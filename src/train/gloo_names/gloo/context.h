// SPDX-License-Identifier: Apache-2.0
// See README.md of this folder.
#pragma once
#include <chrono>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);  // NOLINT(readability-identifier-naming)
};

}  // namespace gloo
