// SPDX-License-Identifier: Apache-2.0
// Results go to stdout through here, so that a full disk is an error and a reader that went away (| head)
// is not.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace kilin::cli {

// A closed pipe becomes a failed write instead of a signal. Call once, first.
void ignore_closed_pipes();

// Writes and flushes. False once the reader has closed the pipe (later calls write nothing); throws Error
// for any other failure.
bool write_out(std::string_view text);

// As one line. Text that is not UTF-8 is shown with U+FFFD.
bool write_json_line(const nlohmann::ordered_json& value);

// A line of log on stderr: "kilin: text".
void log_line(std::string_view text);

bool is_terminal(int file_descriptor);

}  // namespace kilin::cli
