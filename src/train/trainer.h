// SPDX-License-Identifier: Apache-2.0
// The training loop.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "train/config.h"

namespace kilin::train {

struct StepReport {
  int64_t step = 0, steps = 0;  // updates done, of
  double loss = 0;              // of this update, nats per counted token
  double rate = 0, grad_norm = 0;
  double tokens_per_second = 0, share_of_peak = 0, seconds_left = 0;
  std::optional<double> accuracy;
};

struct TrainHooks {
  bool resume = false;          // go on from the newest checkpoint; begin where there is none
  bool accept_changes = false;  // although keys differ from those that the checkpoint was made with
  // These are called in the first process only. `report` after each update; `log` for single lines.
  std::function<void(const StepReport&)> report;
  std::function<void(const std::string&)> log;
  std::function<bool()> interrupted;  // asked after each update: saves and stops
};

struct TrainResult {
  int64_t steps = 0, tokens = 0;
  double seconds = 0;
  bool interrupted = false;
  bool first_process = true;
  std::string checkpoint;            // the newest one; empty: none
  std::optional<double> train_loss;  // mean over the last tenth of the updates
  std::optional<double> valid_loss, valid_perplexity, valid_accuracy, valid_exact;
  double tokens_per_second = 0, share_of_peak = 0, peak_flops = 0;
};

// Trains as the configuration says. Throws Error for what does not fit, before the first update, and when the
// loss is no number, with the newest checkpoint kept.
TrainResult train(const TrainConfig& config, const TrainHooks& hooks);

}  // namespace kilin::train
