// SPDX-License-Identifier: Apache-2.0
#include "train/run_directory.h"

#include <gtest/gtest.h>

#include "io/test_support.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::TemporaryDirectory;

void save(const RunDirectory& run, int64_t step, int64_t keep) {
  const std::string directory = run.begin(step);
  std::ofstream(directory + "/model.safetensors") << "weights";
  TrainerState state;
  state.step = step;
  run.commit(state, keep);
}

TEST(RunDirectory, StateComesBackToTheBit) {
  const TemporaryDirectory directory;
  TrainerState state;
  state.step = 7;
  state.tokens = 1 << 20;
  state.seconds = 0.1 + 0.2;
  state.loss_sum = 1.0 / 3.0;
  state.tail_sum = 1e-300;
  state.loss_steps = 3;
  state.config = {{"optimizer.lr", "0.001"}, {"run.out", "\"x\""}};
  const std::string file = directory.write("s.json", to_json(state));
  EXPECT_EQ(read_trainer_state(file), state);
  const std::string broken = directory.write("b.json", "{\"format\": 2}");
  EXPECT_EQ(error_of([&] { read_trainer_state(broken); }),
            broken + ": key 'format': found 2, expected an integer from 1 to 1");
}

TEST(RunDirectory, KeepsTheNewestAndCountsOnlyCompleteOnes) {
  const TemporaryDirectory directory;
  const RunDirectory run(directory.file("run"));
  EXPECT_FALSE(run.latest());
  for (const int64_t step : {5, 10, 15, 1000000}) save(run, step, 2);
  EXPECT_EQ(run.checkpoints(), (std::vector<int64_t>{15, 1000000}));
  EXPECT_EQ(run.checkpoint(15), directory.file("run/step-000015"));
  // What a killed process may leave
  std::filesystem::create_directory(directory.file("run/.writing-step-000020"));
  std::filesystem::create_directory(directory.file("run/.removing-step-000010"));
  std::filesystem::create_directory(directory.file("run/step-000020"));  // without a state it is none
  std::filesystem::create_directory(directory.file("run/step-x"));
  EXPECT_EQ(run.latest(), 1000000);
  run.clean();
  EXPECT_FALSE(std::filesystem::exists(directory.file("run/.writing-step-000020")));
  EXPECT_FALSE(std::filesystem::exists(directory.file("run/.removing-step-000010")));
  EXPECT_EQ(run.checkpoints().size(), 2u);
}

TEST(RunDirectory, SavesAStepAgainAndOlderOnesNeverPushItOut) {
  const TemporaryDirectory directory;
  const RunDirectory run(directory.file("run"));
  save(run, 10, 1);
  save(run, 10, 1);
  EXPECT_EQ(run.checkpoints(), (std::vector<int64_t>{10}));
  save(run, 20, 1);
  EXPECT_EQ(run.checkpoints(), (std::vector<int64_t>{20}));
  EXPECT_EQ(error_of([&] { RunDirectory(directory.write("file", "")); }).find(directory.file("file")), 0u);
}

}  // namespace
}  // namespace kilin::train
