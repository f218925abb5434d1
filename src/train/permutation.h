// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace kilin::train {

// A shuffle of 0 .. size - 1 that is computed place by place, without memory: four rounds of a Feistel
// network over the next power of four, walked until the result is inside. A run that is resumed needs no more
// than the place at which it stopped.
class Permutation {
 public:
  Permutation(uint64_t size, uint64_t seed);
  // index < size; the results of all indices are all different.
  uint64_t operator()(uint64_t index) const;

 private:
  uint64_t size_;
  uint64_t seed_;
  int half_bits_;
};

// Mixes 64 bits (base/random.h; 0 gives no 0): for seeds that are made of other seeds.
uint64_t mix_bits(uint64_t x);

}  // namespace kilin::train
