// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps between calls of a kernel: grown to the largest call it has seen. 64-byte
// aligned, in huge pages where it is large, not initialised.
#pragma once
#include <cstddef>
#include <memory>
#include <utility>

#include "base/huge_memory.h"

namespace kilin {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Scratch&& other) noexcept
      : memory_(std::move(other.memory_)), size_(std::exchange(other.size_, 0)) {}
  Scratch& operator=(Scratch&& other) noexcept {
    memory_ = std::move(other.memory_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  T* get(size_t count) {
    if (count > size_) {
      memory_.reset();  // before the new one, so that both never exist at once
      size_ = 0;        // should there be no memory for it
      memory_.reset(static_cast<T*>(allocate_huge(count * sizeof(T))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T, FreeHuge> memory_;
  size_t size_ = 0;
};

}  // namespace kilin
