// SPDX-License-Identifier: Apache-2.0
// A run's checkpoints: a Hugging Face directory (or PEFT's, with LoRA) that also holds what the run needs to
// go on exactly: optimizer.safetensors and trainer_state.json.
#pragma once
#include <string>

#include "train/optimizer.h"
#include "train/run_directory.h"
#include "train/torch_model.h"

namespace kilin::train {

// Writes all of it and gives it its name; see RunDirectory.
void write_checkpoint(const RunDirectory& run, const TrainConfig& config, const TorchModel& model,
                      const Optimizer& optimizer, const TrainerState& state);

// The model of a checkpoint's directory. Its weights are those of the run to the bit only after
// restore_exactly(): the files may hold them as bfloat16.
TorchModel load_checkpoint_model(const std::string& directory, const TrainConfig& config,
                                 const ModelOptions& options);
void restore_exactly(const std::string& directory, const TorchModel& model, Optimizer& optimizer,
                     int64_t updates);

// The files of a tokenizer and chat template that a directory has.
std::vector<std::string> tokenizer_files(const std::string& directory);

}  // namespace kilin::train
