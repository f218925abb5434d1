// SPDX-License-Identifier: Apache-2.0
#include "engine/stop_scanner.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace kilin {

StopScanner::StopScanner(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) check(!stop.empty(), "stop: found an empty text");
}

// Length of the longest end of pending_ that begins a stop text.
size_t StopScanner::held_length() const {
  size_t held = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(pending_.size(), stop.size() - 1); n > held; --n) {
      if (pending_.compare(pending_.size() - n, n, stop, 0, n) == 0) {
        held = n;
        break;
      }
    }
  }
  return held;
}

std::string StopScanner::push(std::string_view piece) {
  if (stopped_) return "";
  pending_ += piece;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) first = std::min(first, pending_.find(stop));
  std::string safe;
  if (first != std::string::npos) {
    stopped_ = true;
    safe = pending_.substr(0, first);
    pending_.clear();
    return safe;
  }
  const size_t keep = held_length();
  safe = pending_.substr(0, pending_.size() - keep);
  pending_.erase(0, safe.size());
  return safe;
}

std::string StopScanner::flush() { return stopped_ ? "" : std::exchange(pending_, {}); }

}  // namespace kilin
