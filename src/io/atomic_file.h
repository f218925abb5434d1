// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kilin::io {

// Writes a file that appears whole or not at all: bytes go to a temporary name in the same directory,
// commit() syncs and renames it over the target. Without commit() the temporary is removed and the target
// untouched. Every failure is an Error that names the target and says what the system said.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Replaces bytes that were written already: offset + size <= written().
  void rewrite(uint64_t offset, const void* data, size_t size);
  uint64_t written() const { return written_; }
  void commit();

 private:
  std::string path_;
  std::string temporary_;  // empty once renamed
  int fd_ = -1;
  uint64_t written_ = 0;
};

}  // namespace kilin::io
