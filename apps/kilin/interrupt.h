// SPDX-License-Identifier: Apache-2.0
// Ctrl-C: the first one asks the work in progress to end, the second one kills the program.
#pragma once
#include <csignal>

namespace kilin::cli {

// While one exists, the first SIGINT sets interrupted() and the next one has its default effect.
class InterruptScope {
 public:
  InterruptScope();
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

  bool interrupted() const;

 private:
  struct sigaction before_ {};
};

// What shells report for a program that SIGINT ended.
inline constexpr int kInterruptedExit = 130;

}  // namespace kilin::cli
