// SPDX-License-Identifier: Apache-2.0
#include "io/printable.h"

#include <fmt/format.h>

#include <iterator>
#include <system_error>

namespace kilin::io {

std::string printable(std::string_view text, size_t limit) {
  std::string out;
  for (char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      fmt::format_to(std::back_inserter(out), "\\x{:02x}", byte);
    }
  }
  return text.size() > limit ? out + "..." : out;
}

std::string errno_text(int error) { return std::generic_category().message(error); }

}  // namespace kilin::io
