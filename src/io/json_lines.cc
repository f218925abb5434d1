// SPDX-License-Identifier: Apache-2.0
#include "io/json_lines.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace kilin::io {

void for_each_json_line(std::string_view text, const std::string& name,
                        const std::function<void(const JsonReader&, int64_t line)>& use) {
  bool any = false;
  int64_t number = 1;
  for (size_t begin = 0; begin < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = fmt::format("{}:{}", name, number);
    check(line.size() <= kMaxJsonBytes, "{}: found {} bytes, expected at most {} bytes of JSON", place,
          line.size(), kMaxJsonBytes);
    use(JsonReader(parse_json(line, place), place), number);
    any = true;
  }
  check(any, "{}: found no records, expected a JSON object per line", name);
}

}  // namespace kilin::io
