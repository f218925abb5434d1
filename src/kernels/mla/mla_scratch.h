// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps between calls of kernels/mla: grown to the largest call it has seen, which the
// budgets in mla_absorbed.cc and mla_expanded.cc bound. 64-byte aligned, not initialised.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace kilin {

template <class T>
class MlaScratch {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      memory_.reset();  // before the new one, so that both never exist at once
      size_ = 0;        // should there be no memory for it
      memory_.reset(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlignment)));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace kilin
