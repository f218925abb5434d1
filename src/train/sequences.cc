// SPDX-License-Identifier: Apache-2.0
#include "train/sequences.h"

#include <ATen/ATen.h>

namespace kilin::train {

Sequences Sequences::of(const std::vector<int32_t>& cu, at::Device device) {
  std::vector<int64_t> positions(static_cast<size_t>(cu.back()));
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    for (int64_t r = cu[s]; r < cu[s + 1]; ++r) positions[static_cast<size_t>(r)] = r - cu[s];
  }
  return {cu, at::tensor(cu, at::kInt).to(device), at::tensor(positions, at::kLong).to(device)};
}

}  // namespace kilin::train
