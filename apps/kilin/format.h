// SPDX-License-Identifier: Apache-2.0
// Numbers as people read them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace kilin::cli {

std::string with_commas(int64_t count);      // 12,896,536
std::string human_count(double count);       // 12.9 M
std::string human_bytes(double bytes);       // 24.6 MiB
std::string human_duration(double seconds);  // 350 ms, 4.2 s, 3:07, 2:15:09
std::string human_rate(double per_second);   // 8.31, 412, 12,345
std::string percent(double share);           // 83 %, 0.4 %
// The text on one line: line ends and other control characters become spaces.
std::string one_line(std::string_view text);

}  // namespace kilin::cli
