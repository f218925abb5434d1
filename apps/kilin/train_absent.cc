// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "kilin/train_run.h"

namespace kilin::cli {

int run_training(const train::TrainConfig& /*config*/, const TrainOptions& /*options*/) {
  fail(
      "this build has no training: 'cmake --preset train && cmake --build --preset train' makes "
      "build/train/kilin, "
      "which has it (docs/guides/training.md)");
}

}  // namespace kilin::cli
