// SPDX-License-Identifier: Apache-2.0
#include "kilin/output.h"

#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "io/printable.h"
#include "kilin/format.h"

namespace kilin::cli {
namespace {

bool& reader_gone() {
  static bool gone = false;
  return gone;
}

}  // namespace

void ignore_closed_pipes() { std::signal(SIGPIPE, SIG_IGN); }

bool write_out(std::string_view text) {
  if (reader_gone()) return false;
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EPIPE) {
      reader_gone() = true;
      return false;
    } else if (errno != EINTR && errno != EAGAIN) {
      fail("standard output: {}", io::errno_text(errno));
    }
  }
  return true;
}

bool write_json_line(const nlohmann::ordered_json& value) {
  return write_out(value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

void log_line(std::string_view text) {
  const std::string line = "kilin: " + one_line(text) + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

bool is_terminal(int file_descriptor) { return isatty(file_descriptor) == 1; }

}  // namespace kilin::cli
