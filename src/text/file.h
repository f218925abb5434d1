// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <filesystem>
#include <string>

namespace kilin::text {

// The whole of a regular file; Error when it cannot be read or has more than max_bytes.
std::string read_file(const std::filesystem::path& path, size_t max_bytes);

}  // namespace kilin::text
