// SPDX-License-Identifier: Apache-2.0
// The processes of one training run, over torch's c10d: gloo on the CPU, NCCL on GPUs. They find each other
// as torchrun's do, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

namespace kilin::train {

struct Ranks {
  int rank = 0;
  int size = 1;
  int local = 0;  // number of the process on its machine: the GPU that it takes
};

// Of the environment; one process where WORLD_SIZE is not set. Throws Error naming the variable for values
// that make no sense.
Ranks ranks_from_environment();

class ProcessGroup {
 public:
  // Waits until all processes are there. Throws Error when they do not come, and for device "cuda" in a build
  // without NCCL. One process needs no communication, and gets none.
  static std::unique_ptr<ProcessGroup> create(const Ranks& ranks, bool cuda);
  virtual ~ProcessGroup() = default;

  int rank() const { return ranks_.rank; }
  int size() const { return ranks_.size; }
  bool first() const { return ranks_.rank == 0; }

  // The sum over all processes, in place, the same bits on each. Contiguous tensors on the group's device.
  virtual void sum(at::Tensor& tensor) = 0;
  virtual void barrier() = 0;

 protected:
  explicit ProcessGroup(const Ranks& ranks) : ranks_(ranks) {}
  Ranks ranks_;
};

}  // namespace kilin::train
