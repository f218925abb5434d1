// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <deque>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/matmul/matmul.h"

namespace kilin {

// The memory of a model's packed matrices, in huge pages where the system has them, and the list of what is
// to be packed there: add() for every matrix, then pack() once with all threads.
class PackedMemory {
 public:
  PackedMemory() = default;
  ~PackedMemory();
  PackedMemory(PackedMemory&& other) noexcept;
  PackedMemory& operator=(PackedMemory&& other) noexcept;
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;

  // A place for a stored row-major matrix, which must stay readable until pack(). Error when memory is out.
  // Q5_0, which has no packed form, becomes Q8_0 of the same values.
  WeightMatrix add(Dtype dtype, const void* stored, int64_t rows, int64_t cols);
  // The same for values made here, kept in a plain type (kF32, kF16, kBF16) that holds them exactly.
  WeightMatrix add(Dtype dtype, std::span<const float> values, int64_t rows, int64_t cols);
  void pack(ThreadPool& pool);

  size_t bytes() const { return bytes_; }  // of all packed matrices

 private:
  struct Chunk {
    std::byte* data;
    size_t size, used;
  };
  struct Task {
    const void* stored;
    std::byte* target;
    Dtype dtype;  // stored; that of the packed matrix is packed_dtype()
    int64_t rows, cols;
  };
  std::byte* allocate(size_t bytes);
  static void pack_rows(const Task& task, int64_t begin, int64_t end);
  void free_chunks() noexcept;

  std::vector<Chunk> chunks_;
  std::vector<Task> tasks_;
  std::deque<std::vector<std::byte>> made_;  // until pack()
  size_t bytes_ = 0;
};

}  // namespace kilin
