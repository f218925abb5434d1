// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <string_view>

namespace kilin::io {

// Text out of a file, fit for an error message: one line, at most `limit` bytes of it ("..." marks a cut),
// every byte outside printable ASCII as \xNN. Names in hostile files may hold anything.
std::string printable(std::string_view text, size_t limit = 96);

// What a failed system call says: "No such file or directory".
std::string errno_text(int error);

}  // namespace kilin::io
