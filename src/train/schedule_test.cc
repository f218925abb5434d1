// SPDX-License-Identifier: Apache-2.0
#include "train/schedule.h"

#include <gtest/gtest.h>

#include <set>

#include "train/permutation.h"

namespace kilin::train {
namespace {

TEST(Schedule, WarmupRisesToThePeak) {
  const Schedule s{ScheduleKind::kConstant, 0.5, 0, 5, 0, 10};
  EXPECT_DOUBLE_EQ(s.rate(0), 0.1);
  EXPECT_DOUBLE_EQ(s.rate(3), 0.4);
  EXPECT_DOUBLE_EQ(s.rate(4), 0.5);
  EXPECT_DOUBLE_EQ(s.rate(9), 0.5);
  EXPECT_DOUBLE_EQ(s.rate(1000), 0.5);
}

TEST(Schedule, WsdDecaysOverItsLastSteps) {
  const Schedule s{ScheduleKind::kWsd, 1.0, 0.1, 2, 4, 10};
  EXPECT_DOUBLE_EQ(s.rate(1), 1.0);
  EXPECT_DOUBLE_EQ(s.rate(5), 1.0);
  EXPECT_DOUBLE_EQ(s.rate(6), 0.1 + 0.9 * 4 / 5);
  EXPECT_DOUBLE_EQ(s.rate(9), 0.1 + 0.9 * 1 / 5);
}

TEST(Schedule, CosineFallsFromPeakTowardsTheFloor) {
  const Schedule s{ScheduleKind::kCosine, 2.0, 0.25, 0, 0, 100};
  EXPECT_DOUBLE_EQ(s.rate(0), 2.0);
  EXPECT_NEAR(s.rate(50), 1.25, 1e-12);  // half way between 2 and 0.5
  EXPECT_GT(s.rate(99), 0.5);
  EXPECT_LT(s.rate(99), 0.501);
  for (int64_t i = 1; i < 100; ++i) EXPECT_LT(s.rate(i), s.rate(i - 1));
}

TEST(Permutation, IsOneForEverySize) {
  for (const uint64_t size : {1u, 2u, 3u, 5u, 64u, 65u, 1000u, 4097u}) {
    const Permutation shuffle(size, 7);
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < size; ++i) {
      EXPECT_LT(shuffle(i), size);
      seen.insert(shuffle(i));
    }
    EXPECT_EQ(seen.size(), size);
  }
}

TEST(Permutation, DependsOnTheSeedAndMixes) {
  constexpr uint64_t kSize = 1000;
  const Permutation first(kSize, 1), second(kSize, 2);
  int same = 0;
  int close = 0;
  for (uint64_t i = 0; i + 1 < kSize; ++i) {
    same += first(i) == second(i) ? 1 : 0;
    close += first(i) + 1 == first(i + 1) ? 1 : 0;
  }
  EXPECT_LT(same, 20);   // 1 expected of two random shuffles
  EXPECT_LT(close, 20);  // 1 expected of one
}

}  // namespace
}  // namespace kilin::train
