// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

namespace kilin::train {

// Writes the line to stderr, the first time that it is given.
void notice_once(const std::string& line);

}  // namespace kilin::train
