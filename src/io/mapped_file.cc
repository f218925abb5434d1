// SPDX-License-Identifier: Apache-2.0
#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/error.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

// Closes the descriptor on every way out; a mapping outlives it.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a FIFO must fail below instead of waiting for a writer.
  const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail("{}: cannot open: {}", path_, errno_text(errno));
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) fail("{}: cannot read its size: {}", path_, errno_text(errno));
  check(!S_ISDIR(status.st_mode), "{}: cannot open: {}", path_, errno_text(EISDIR));
  check(S_ISREG(status.st_mode), "{}: cannot map: not a regular file", path_);
  if (status.st_size == 0) return;
  const auto size = static_cast<size_t>(status.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd, 0);
  if (data == MAP_FAILED) fail("{}: cannot map {} bytes: {}", path_, size, errno_text(errno));
  data_ = data;
  size_ = size;
}

MappedFile::~MappedFile() { unmap(); }

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    unmap();
    path_ = std::move(other.path_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void MappedFile::unmap() noexcept {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void MappedFile::advise(Access access) const {
  if (data_ == nullptr) return;
  int advice = MADV_NORMAL;
  if (access == Access::kSequential) advice = MADV_SEQUENTIAL;
  if (access == Access::kRandom) advice = MADV_RANDOM;
  if (access == Access::kWillNeed) advice = MADV_WILLNEED;
  if (access == Access::kDontNeed) advice = MADV_DONTNEED;
  (void)::madvise(data_, size_, advice);
}

}  // namespace kilin::io
