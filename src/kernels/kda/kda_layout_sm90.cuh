// SPDX-License-Identifier: Apache-2.0
// Where chunks and sequences lie, for the chunk kernels and the gradient kernels, whose chunks differ in
// length.
#pragma once
#include <cstdint>

namespace kilin::cuda {

// Where a chunk or a sequence lies. offsets, starts and chunks are null when all sequences are `length`
// tokens long.
struct KdaLayout {
  int sequences = 0;
  int64_t length = 0;                // of every sequence
  int chunks_per_sequence = 0;       // with length
  const int32_t* offsets = nullptr;  // [N + 1] first chunk of each sequence
  const int64_t* starts = nullptr;   // [N + 1] first token of each sequence
  const int64_t* chunks =
      nullptr;  // [chunks] first token and, in the top 8 bits, the number of tokens less one
};

// The sequence of a block.
struct KdaSequence {
  int64_t first;  // token
  int64_t length;
  int64_t chunk;  // first chunk
  int chunks;
};

__device__ __forceinline__ KdaSequence kda_sequence(const KdaLayout& layout, int n) {
  if (layout.offsets == nullptr) {
    return {n * layout.length, layout.length, static_cast<int64_t>(n) * layout.chunks_per_sequence,
            layout.chunks_per_sequence};
  }
  const int64_t first = layout.starts[n];
  return {first, layout.starts[n + 1] - first, layout.offsets[n], layout.offsets[n + 1] - layout.offsets[n]};
}

// The first token of a chunk of kTokens and the number of its tokens; false for one beyond the last chunk.
template <int kTokens>
__device__ __forceinline__ bool locate_chunk(const KdaLayout& layout, int64_t chunk, int64_t& first,
                                             int& length) {
  if (layout.chunks == nullptr) {
    const int number = static_cast<int>(chunk);  // a division of 64 bits costs a hundred instructions
    const int sequence = number / layout.chunks_per_sequence;
    const int64_t offset = static_cast<int64_t>(number % layout.chunks_per_sequence) * kTokens;
    first = sequence * layout.length + offset;
    length = static_cast<int>(min(static_cast<int64_t>(kTokens), layout.length - offset));
    return true;
  }
  if (chunk >= layout.offsets[layout.sequences]) return false;
  const int64_t entry = layout.chunks[chunk];
  first = entry & ((int64_t{1} << 56) - 1);
  length = static_cast<int>(entry >> 56) + 1;
  return true;
}

// Byte offset of the 16-byte piece `piece` of row `row` in a matrix in the 128-byte swizzle, [columns /
// 64][kRows][64] 16-bit values.
template <int kRows>
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return (piece >> 3) * (kRows * 128) + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

}  // namespace kilin::cuda
