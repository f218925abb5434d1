// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <numeric>
#include <vector>

namespace kilin::train {

// How the rows of a batch are cut into sequences.
struct Sequences {
  std::vector<int32_t> cu;  // [sequences + 1]
  at::Tensor cu_tensor;     // int32, the same on the device
  at::Tensor positions;     // int64 [rows], of each row in its sequence

  static Sequences of(const std::vector<int32_t>& cu, at::Device device);

  int64_t count() const { return static_cast<int64_t>(cu.size()) - 1; }
  int64_t rows() const { return cu.back(); }
  int64_t length(int64_t i) const { return cu[static_cast<size_t>(i) + 1] - cu[static_cast<size_t>(i)]; }
};

// The slots of fresh sequences in the kernels' pools of states: sequence n has slot n.
inline std::vector<int32_t> slots_in_order(const std::vector<int32_t>& cu) {
  std::vector<int32_t> slots(cu.size() - 1);
  std::iota(slots.begin(), slots.end(), 0);
  return slots;
}

}  // namespace kilin::train
