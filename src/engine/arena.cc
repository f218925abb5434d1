// SPDX-License-Identifier: Apache-2.0
#include "engine/arena.h"

#include <algorithm>

namespace kilin {
namespace {
constexpr size_t kAlignFloats = 16;
constexpr size_t kBlockFloats = size_t{1} << 20;
}  // namespace

float* Arena::allocate(int64_t floats) {
  const size_t need = (static_cast<size_t>(floats) + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
  while (block_ < blocks_.size() && used_ + need > blocks_[block_].floats) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size()) {
    const size_t size = std::max(need, kBlockFloats);
    blocks_.push_back(
        {std::unique_ptr<float[], FreeHuge>(static_cast<float*>(allocate_huge(size * sizeof(float)))), size});
    used_ = 0;
  }
  float* p = blocks_[block_].data.get() + used_;
  used_ += need;
  return p;
}

}  // namespace kilin
