// SPDX-License-Identifier: Apache-2.0
#include "train/permutation.h"

#include <bit>

#include "base/error.h"
#include "base/random.h"

namespace kilin::train {
namespace {

constexpr int kRounds = 4;

}  // namespace

uint64_t mix_bits(uint64_t x) { return mixed_bits(x + 1); }

Permutation::Permutation(uint64_t size, uint64_t seed) : size_(size), seed_(seed) {
  KILIN_ASSERT(size > 0 && size <= uint64_t{1} << 62);
  half_bits_ = (std::bit_width(size - 1) + 1) / 2;
  if (half_bits_ == 0) half_bits_ = 1;
}

uint64_t Permutation::operator()(uint64_t index) const {
  KILIN_ASSERT(index < size_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  do {
    uint64_t left = index >> half_bits_;
    uint64_t right = index & mask;
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t mixed = mix_bits(right ^ mix_bits(seed_ + static_cast<uint64_t>(round))) & mask;
      const uint64_t next = left ^ mixed;
      left = right;
      right = next;
    }
    index = (left << half_bits_) | right;
  } while (index >= size_);
  return index;
}

}  // namespace kilin::train
