// SPDX-License-Identifier: Apache-2.0
// What a training run takes, counted from its configuration.
#pragma once
#include <cstdint>

#include "model/config.h"
#include "train/config.h"

namespace kilin::train {

struct TrainingCost {
  int64_t parameters = 0;
  int64_t active = 0;  // used for one token, without the embedding's rows
  // Of one token forward and backward (3 x forward): 2 for every active parameter of a matrix, 6 key x value
  // a head for the state of linear attention (read, written, read), and causal attention over half the row in
  // MLA. Work that a method adds (chunks, recomputed activations) is not counted, so rate x this / peak is
  // the share of peak that the model itself needs ("model flops utilisation").
  double flops_per_token = 0;
  double bytes_weights = 0, bytes_gradients = 0, bytes_optimizer = 0;  // float32; activations come on top
};

TrainingCost training_cost(const TrainConfig& config);

}  // namespace kilin::train
