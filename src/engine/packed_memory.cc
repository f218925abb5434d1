// SPDX-License-Identifier: Apache-2.0
#include "engine/packed_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "quant/formats.h"

namespace kilin {
namespace {

// Address space taken at once; the system gives memory only for what is written.
constexpr size_t kChunk = size_t{1} << 28;
constexpr size_t kHugePage = size_t{1} << 21;
// Stored bytes of one piece of packing work.
constexpr size_t kPieceBytes = size_t{1} << 19;

Dtype packed_dtype(Dtype stored) { return stored == Dtype::kQ5_0 ? Dtype::kQ8_0 : stored; }

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

PackedMemory::~PackedMemory() { free_chunks(); }

PackedMemory::PackedMemory(PackedMemory&& other) noexcept
    : chunks_(std::exchange(other.chunks_, {})),
      tasks_(std::exchange(other.tasks_, {})),
      made_(std::move(other.made_)),
      bytes_(std::exchange(other.bytes_, 0)) {}

PackedMemory& PackedMemory::operator=(PackedMemory&& other) noexcept {
  if (this == &other) return *this;
  free_chunks();
  chunks_ = std::exchange(other.chunks_, {});
  tasks_ = std::exchange(other.tasks_, {});
  made_ = std::move(other.made_);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

void PackedMemory::free_chunks() noexcept {
  for (const Chunk& chunk : chunks_) munmap(chunk.data, chunk.size);
}

std::byte* PackedMemory::allocate(size_t bytes) {
  bytes = round_up(bytes, kPackAlignment);
  if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
    const size_t size = round_up(std::max(bytes, kChunk), kHugePage);
    void* data =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(data != MAP_FAILED, "weights: the system has no {} bytes of address space left", size);
    madvise(data, size, MADV_HUGEPAGE);  // fewer page walks; without it only slower
    chunks_.push_back({static_cast<std::byte*>(data), size, 0});
  }
  Chunk& chunk = chunks_.back();
  std::byte* const place = chunk.data + chunk.used;
  chunk.used += bytes;
  bytes_ += bytes;
  return place;
}

WeightMatrix PackedMemory::add(Dtype dtype, const void* stored, int64_t rows, int64_t cols) {
  const Dtype packed = packed_dtype(dtype);
  std::byte* const target = allocate(packed_bytes(packed, rows, cols));
  tasks_.push_back({stored, target, dtype, rows, cols});
  return {target, packed, rows, cols};
}

WeightMatrix PackedMemory::add(Dtype dtype, std::span<const float> values, int64_t rows, int64_t cols) {
  const auto n = static_cast<int64_t>(values.size());
  KILIN_ASSERT(n == rows * cols && !is_quantized(dtype));
  std::vector<std::byte>& bytes = made_.emplace_back(dtype_bytes(dtype, n));
  quant::quantize(dtype, values.data(), n, bytes.data());
  return add(dtype, bytes.data(), rows, cols);
}

void PackedMemory::pack_rows(const Task& task, int64_t begin, int64_t end) {
  if (task.dtype != Dtype::kQ5_0) {
    return pack_weights(task.dtype, task.stored, task.rows, task.cols, begin, end, task.target);
  }
  const int64_t rows = end - begin;
  const auto* stored =
      static_cast<const std::byte*>(task.stored) + dtype_bytes(task.dtype, begin * task.cols);
  std::vector<std::byte> blocks(dtype_bytes(Dtype::kQ8_0, rows * task.cols));
  quant::q5_0_to_q8_0(stored, rows * task.cols, blocks.data());
  pack_weights(Dtype::kQ8_0, blocks.data(), rows, task.cols, 0, rows,
               task.target + packed_bytes(Dtype::kQ8_0, begin, task.cols));
}

void PackedMemory::pack(ThreadPool& pool) {
  struct Piece {
    const Task* task;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  for (const Task& task : tasks_) {
    const size_t row_bytes = std::max<size_t>(1, dtype_bytes(task.dtype, task.cols));
    const int64_t step =
        std::max<int64_t>(1, static_cast<int64_t>(kPieceBytes / row_bytes) / kPanelRows) * kPanelRows;
    for (int64_t r = 0; r < task.rows; r += step) pieces.push_back({&task, r, std::min(task.rows, r + step)});
  }
  pool.parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i, int) {
    const auto& [task, begin, end] = pieces[static_cast<size_t>(i)];
    pack_rows(*task, begin, end);
  });
  tasks_.clear();
  made_.clear();
}

}  // namespace kilin
