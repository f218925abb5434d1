// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>

namespace kilin {

// How the rows of one computation lie: tokens of all sequences one after another. Prefill is a batch of long
// sequences, decode one of single tokens, a training step one of fresh sequences; the model text is the same.
struct Batch {
  std::span<const int32_t> tokens;  // [rows] token ids
  std::span<const int32_t>
      cu_seqlens;  // [sequences + 1] sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1] - 1
  std::span<const int32_t> slots;   // [sequences] where the state of each sequence lives, all different
  std::span<const int64_t> past;    // [sequences] tokens that each sequence has had before
  std::span<const int32_t> wanted;  // rows whose logits are asked for, rising

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
  int sequences() const { return static_cast<int>(slots.size()); }
};

}  // namespace kilin
