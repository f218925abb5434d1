// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace kilin::train {

enum class ScheduleKind { kConstant, kCosine, kWsd };

// The learning rate by step. `warmup` steps rise linearly to the peak (step 0 has 1/warmup of it). Then
//   constant  the peak
//   cosine    floor + (peak - floor) (1 + cos(pi x)) / 2, x from 0 after the warm-up to 1 after the last step
//   wsd       the peak, and over the last `decay` steps linearly to the floor (warm-up, stable, decay:
//             arXiv 2404.06395)
struct Schedule {
  ScheduleKind kind = ScheduleKind::kWsd;
  double peak = 0;
  double floor_share = 0;  // the floor as a share of the peak
  int64_t warmup = 0;
  int64_t decay = 0;  // wsd only
  int64_t steps = 1;

  // Of the step'th update, counted from 0; steps behind the last one have its rate.
  double rate(int64_t step) const;
};

}  // namespace kilin::train
