// SPDX-License-Identifier: Apache-2.0
// Memory for large arrays that are read with long strides: in huge pages where the system grants them,
// because a walk over 4 KB pages costs a translation miss per row. 64-byte aligned, not cleared.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

namespace kilin {

void* allocate_huge(size_t bytes);  // throws std::bad_alloc
void free_huge(void* p) noexcept;

// For std::vector. Elements of a growing vector are value-initialised as always.
template <class T>
struct HugeAllocator {
  using value_type = T;
  HugeAllocator() = default;
  template <class U>
  HugeAllocator(const HugeAllocator<U>&) {
  }  // NOLINT(google-explicit-constructor): what an allocator has to have
  T* allocate(size_t n) { return static_cast<T*>(allocate_huge(n * sizeof(T))); }
  void deallocate(T* p, size_t) noexcept { free_huge(p); }
  friend bool operator==(const HugeAllocator&, const HugeAllocator&) { return true; }
};

template <class T>
using HugeVector = std::vector<T, HugeAllocator<T>>;

struct FreeHuge {
  void operator()(void* p) const noexcept { free_huge(p); }
};

}  // namespace kilin
