// SPDX-License-Identifier: Apache-2.0
#include "io/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

constexpr size_t kWriteChunk = size_t{1} << 30;  // Linux writes at most 2 GiB - 4 KiB in one call
constexpr int kNameAttempts = 100;

std::atomic<unsigned> g_next_temporary{0};

// A rename is only safe against power loss once its directory is on the disk. Some file systems cannot sync a
// directory; the new file is complete under its name either way, so a failure here is no error.
void sync_directory_of(const std::string& path) {
  std::filesystem::path directory = std::filesystem::path(path).parent_path();
  if (directory.empty()) directory = ".";
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  (void)::fsync(fd);
  ::close(fd);
}

}  // namespace

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  // open() rather than mkstemp(): it leaves the permissions to the user's umask.
  for (int attempt = 0; attempt < kNameAttempts; ++attempt) {
    temporary_ = fmt::format("{}.tmp-{}-{}", path_, ::getpid(), g_next_temporary++);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ >= 0 || errno != EEXIST) break;
  }
  if (fd_ < 0) fail("{}: cannot write: cannot create '{}': {}", path_, temporary_, errno_text(errno));
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t size) {
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t done = ::write(fd_, from, std::min(size, kWriteChunk));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("{}: cannot write after {} bytes: {}", path_, written_, errno_text(errno));
    from += done;
    size -= static_cast<size_t>(done);
    written_ += static_cast<uint64_t>(done);
  }
}

void AtomicFile::rewrite(uint64_t offset, const void* data, size_t size) {
  KILIN_ASSERT(offset + size <= written_);
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t done = ::pwrite(fd_, from, std::min(size, kWriteChunk), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("{}: cannot write at byte {}: {}", path_, offset, errno_text(errno));
    from += done;
    size -= static_cast<size_t>(done);
    offset += static_cast<uint64_t>(done);
  }
}

// if + fail rather than check(): its arguments, errno among them, may be evaluated before its condition.
void AtomicFile::commit() {
  if (::fsync(fd_) != 0)
    fail("{}: cannot write {} bytes to the disk: {}", path_, written_, errno_text(errno));
  if (::close(std::exchange(fd_, -1)) != 0) {
    fail("{}: cannot close after {} bytes: {}", path_, written_, errno_text(errno));
  }
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail("{}: cannot rename '{}' to it: {}", path_, temporary_, errno_text(errno));
  }
  temporary_.clear();
  sync_directory_of(path_);
}

}  // namespace kilin::io
