// SPDX-License-Identifier: Apache-2.0
#include "kilin/machine_probe.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "kilin/common.h"
#include "kilin/machine_probe_isa.h"

namespace kilin::cli {
namespace {

constexpr int kPasses = 5;
constexpr int64_t kBlocks = 256;
constexpr int64_t kBlockFloats = kProbeBytes / kBlocks / static_cast<int64_t>(sizeof(float));

// The results of the loops go here, so that they are not optimised away.
std::atomic<float> sink{0};

template <class Pass>
double best_seconds(const Pass& pass) {
  double best = 1e30;
  for (int i = 0; i < kPasses; ++i) {
    const Stopwatch watch;
    pass();
    best = std::min(best, watch.seconds());
  }
  return best;
}

}  // namespace

ReadProbe::ReadProbe(ThreadPool& pool)
    : pool_(pool), buffer_(std::make_unique_for_overwrite<float[]>(kBlocks * kBlockFloats)) {
  // Written first by the threads that read: untouched pages would all be the same page of zeros.
  pool_.parallel_for(kBlocks, [&](int64_t i, int) {
    std::fill_n(buffer_.get() + i * kBlockFloats, kBlockFloats, static_cast<float>(i));
  });
}

double ReadProbe::measure() {
  const auto sum = KILIN_DISPATCH(probe_sum);
  const Stopwatch watch;
  pool_.parallel_for(kBlocks,
                     [&](int64_t i, int) { sink = sum(buffer_.get() + i * kBlockFloats, kBlockFloats); });
  return static_cast<double>(kProbeBytes) / watch.seconds();
}

double measure_read_bandwidth(ThreadPool& pool) {
  ReadProbe probe(pool);
  return static_cast<double>(kProbeBytes) / best_seconds([&] { probe.measure(); });
}

double measure_peak_flops(ThreadPool& pool) {
  const auto multiply_add = KILIN_DISPATCH(probe_multiply_add);
  constexpr int64_t kRounds = 2'000'000;
  const int64_t tasks = pool.size();
  const double seconds =
      best_seconds([&] { pool.parallel_for(tasks, [&](int64_t, int) { sink = multiply_add(kRounds); }); });
  const auto flops = KILIN_DISPATCH(probe_flops_per_round)();
  return static_cast<double>(flops) * static_cast<double>(kRounds * tasks) / seconds;
}

}  // namespace kilin::cli
