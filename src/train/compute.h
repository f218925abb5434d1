// SPDX-License-Identifier: Apache-2.0
// Losses of rows, for training and for held-out data.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "train/process_group.h"
#include "train/rows.h"
#include "train/torch_model.h"

namespace kilin::train {

struct RowLoss {
  at::Tensor
      sum;  // of the negative log likelihoods of the counted labels, in nats; with a graph when training
  at::Tensor correct;  // bool [counted], whether the likeliest token is the label; undefined unless asked for
};

// rows.counted() must be at least 1.
RowLoss row_loss(TorchModel& model, const PackedRows& rows, bool want_correct);

struct Evaluation {
  double loss = 0;      // mean over the counted labels
  double accuracy = 0;  // share of them
  double exact = 0;     // share of the sequences that have a label, all of whose labels are right
  int64_t counted = 0;
};

// The first `rows` rows of the source, shared between the processes of the group, `at_once` at a time.
Evaluation evaluate(TorchModel& model, const RowSource& source, int64_t rows, int64_t at_once,
                    ProcessGroup& group);

// Operations per second of a large matrix product on the device, in the type that training multiplies in:
// what share_of_peak is a share of. The best of several.
double measure_peak_flops(const at::Device& device, bool bf16);

}  // namespace kilin::train
