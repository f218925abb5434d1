// SPDX-License-Identifier: Apache-2.0
// Device code: where the sequences of a batch lie.
#pragma once
#include <cstdint>

namespace kilin::cuda {

// `count` sequences of together `tokens` tokens: offsets [count + 1] of int64 (wide) or int32, or null when
// all are of one length.
struct Sequences {
  const void* offsets;
  bool wide;
  int count;
  int64_t tokens;

  __device__ __forceinline__ int64_t begin(int n) const {
    if (offsets == nullptr) return n * (tokens / count);
    return wide ? static_cast<const int64_t*>(offsets)[n] : static_cast<const int32_t*>(offsets)[n];
  }
  // The sequence of token t: the last one that begins at or before it.
  __device__ __forceinline__ int find(int64_t t) const {
    int low = 0;
    int high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begin(middle) <= t) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace kilin::cuda
