// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace kilin::io {

// How a mapping will be read; a hint to the kernel, never an error.
// kDontNeed: the pages read so far may leave the process; they are read again when touched.
enum class Access { kNormal, kSequential, kRandom, kWillNeed, kDontNeed };

// A whole regular file mapped read-only. An empty file maps to an empty span. The file must not be truncated
// by others while it is mapped (reading past its new end raises SIGBUS); replacing it by rename is safe.
class MappedFile {
 public:
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  std::string_view text() const { return {static_cast<const char*>(data_), size_}; }

  void advise(Access access) const;

 private:
  void unmap() noexcept;

  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kilin::io
