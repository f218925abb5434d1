// SPDX-License-Identifier: Apache-2.0
// What this machine can do at best, measured, to compare the engine against.
#pragma once
#include <cstdint>
#include <memory>

#include "base/thread_pool.h"

namespace kilin::cli {

// Bytes that the memory test reads: well beyond any cache (a host's shared L3 may show 480 MB).
inline constexpr int64_t kProbeBytes = int64_t{1} << 30;

// Reads memory from end to end with all threads of a pool.
class ReadProbe {
 public:
  explicit ReadProbe(ThreadPool& pool);
  double measure();  // bytes per second of one pass, now

 private:
  ThreadPool& pool_;
  std::unique_ptr<float[]> buffer_;
};

// The best of several passes.
double measure_read_bandwidth(ThreadPool& pool);

// float32 operations per second (a multiply-add counts two) of all threads in the instruction set in use.
double measure_peak_flops(ThreadPool& pool);

}  // namespace kilin::cli
