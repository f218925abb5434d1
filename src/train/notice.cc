// SPDX-License-Identifier: Apache-2.0
#include "train/notice.h"

#include <fmt/format.h>

#include <cstdio>
#include <mutex>
#include <set>

namespace kilin::train {

void notice_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(line).second) fmt::print(stderr, "kilin: {}\n", line);
}

}  // namespace kilin::train
