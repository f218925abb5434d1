// SPDX-License-Identifier: Apache-2.0
// Private to the room.
#pragma once
#include <ATen/core/Tensor.h>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "train/process_group.h"

namespace kilin::train {

std::unique_ptr<ProcessGroup> gloo_group(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks);
// On the current device of torch.
std::unique_ptr<ProcessGroup> nccl_group(const c10::intrusive_ptr<c10d::Store>& store, const Ranks& ranks);

}  // namespace kilin::train
