// SPDX-License-Identifier: Apache-2.0
// Progress of long work on stderr: one line that is redrawn on a terminal, a line every few seconds
// elsewhere. Silent for the first half second, so that short work shows nothing.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace kilin::cli {

class Progress {
 public:
  // label: "prefill"; unit: "tokens". Disabled: prints nothing.
  Progress(std::string label, int64_t total, std::string unit, bool enabled);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `note` is shown at the end of the line.
  void update(int64_t done, const std::string& note = "");
  // Removes the line from the terminal.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  std::string line(int64_t done, double seconds, const std::string& note) const;

  std::string label_;
  int64_t total_;
  std::string unit_;
  bool enabled_;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point next_;
};

// Whether progress is shown when the user did not say: stderr is a terminal.
bool progress_by_default();

}  // namespace kilin::cli
