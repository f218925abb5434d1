// SPDX-License-Identifier: Apache-2.0
// The part of `kilin train` that needs libtorch: train_run.cc in builds with training, train_absent.cc in
// others.
#pragma once
#include "train/config.h"

namespace kilin::cli {

struct TrainOptions {
  bool resume = false;
  bool accept_changes = false;
  bool json = false;
  bool progress = false;
};

// Returns the exit code.
int run_training(const train::TrainConfig& config, const TrainOptions& options);

}  // namespace kilin::cli
