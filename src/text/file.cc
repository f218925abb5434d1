// SPDX-License-Identifier: Apache-2.0
#include "text/file.h"

#include <fstream>

#include "base/error.h"

namespace kilin::text {

std::string read_file(const std::filesystem::path& path, size_t max_bytes) {
  std::error_code error;
  check(std::filesystem::is_regular_file(path, error), "{}: no such file", path.string());
  const auto size = std::filesystem::file_size(path, error);
  check(!error, "{}: {}", path.string(), error.message());
  check(size <= max_bytes, "{}: {} bytes, expected at most {}", path.string(), size, max_bytes);
  std::ifstream stream(path, std::ios::binary);
  std::string bytes(size, '\0');
  stream.read(bytes.data(), static_cast<std::streamsize>(size));
  check(stream.good() || size == 0, "{}: cannot read its {} bytes", path.string(), size);
  return bytes;
}

}  // namespace kilin::text
