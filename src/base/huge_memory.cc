// SPDX-License-Identifier: Apache-2.0
#include "base/huge_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace kilin {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLine = 64;

}  // namespace

void* allocate_huge(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
  if (bytes > SIZE_MAX - alignment) throw std::bad_alloc();
  const size_t size = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, size > 0 ? size : alignment);
  if (p == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) madvise(p, size, MADV_HUGEPAGE);  // a refusal costs speed only
  return p;
}

void free_huge(void* p) noexcept { std::free(p); }

}  // namespace kilin
