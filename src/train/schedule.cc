// SPDX-License-Identifier: Apache-2.0
#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kilin::train {

double Schedule::rate(int64_t step) const {
  step = std::clamp<int64_t>(step, 0, steps - 1);
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double floor = peak * floor_share;
  if (kind == ScheduleKind::kCosine) {
    // The last update is one step short of x = 1, where the floor would make it do nothing.
    const double x =
        static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, steps - warmup));
    return floor + (peak - floor) * 0.5 * (1.0 + std::cos(std::numbers::pi * x));
  }
  const int64_t left = steps - step;  // updates from this one on
  if (kind == ScheduleKind::kWsd && left <= decay) {
    return floor + (peak - floor) * static_cast<double>(left) / static_cast<double>(decay + 1);
  }
  return peak;
}

}  // namespace kilin::train
