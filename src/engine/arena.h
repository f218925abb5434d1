// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/huge_memory.h"

namespace kilin {

// Memory for the intermediates of one forward pass: handing out and giving back are a pointer's move, and
// after the first pass of a size nothing is allocated any more.
class Arena {
 public:
  struct Mark {
    size_t block;
    size_t used;
  };

  float* allocate(int64_t floats);  // 64-byte aligned, not cleared
  Mark mark() const { return {block_, used_}; }
  void release(const Mark& mark) {
    block_ = mark.block;
    used_ = mark.used;
  }

 private:
  struct Block {
    std::unique_ptr<float[], FreeHuge> data;
    size_t floats;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0;  // the block in use
  size_t used_ = 0;   // floats of it
};

}  // namespace kilin
