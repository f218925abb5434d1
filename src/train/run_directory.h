// SPDX-License-Identifier: Apache-2.0
// The directory of a run: checkpoints step-000500, step-001000, ... and logs. A checkpoint is written under
// another name and renamed when it is complete, so that a name step-N never holds a part of one, whatever is
// killed when.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace kilin::train {

// What a run must know to go on, besides weights and the optimizer's state.
struct TrainerState {
  int64_t step = 0;    // updates done
  int64_t tokens = 0;  // computed, all processes together
  double seconds = 0;  // of computing
  // Of the training loss since the last record of the log, and over the last tenth of the run.
  double loss_sum = 0, accuracy_sum = 0, tail_sum = 0;
  int64_t loss_steps = 0, tail_steps = 0;
  std::map<std::string, std::string> config;  // TrainConfig::flat

  bool operator==(const TrainerState&) const = default;
};

std::string to_json(const TrainerState& state);
// Throws Error naming file and key.
TrainerState read_trainer_state(const std::string& file);

class RunDirectory {
 public:
  // Makes the directory where there is none.
  explicit RunDirectory(std::string path);

  const std::string& path() const { return path_; }
  // Steps of the complete checkpoints, rising.
  std::vector<int64_t> checkpoints() const;
  std::optional<int64_t> latest() const;
  std::string checkpoint(int64_t step) const;  // its directory
  static std::string state_file(const std::string& checkpoint);

  // Removes what killed processes left half-written.
  void clean() const;
  // An empty directory to write a checkpoint's files to.
  std::string begin(int64_t step) const;
  // Adds the state, gives the directory of begin() its name, and removes all but the newest `keep`
  // checkpoints.
  void commit(const TrainerState& state, int64_t keep) const;

 private:
  std::string temporary(int64_t step) const;
  void remove(int64_t step) const;

  std::string path_;
};

}  // namespace kilin::train
