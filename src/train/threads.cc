// SPDX-License-Identifier: Apache-2.0
#include "train/threads.h"

#include <ATen/Parallel.h>

#include <memory>
#include <mutex>

namespace kilin::train {

ThreadPool& threads() {
  static std::mutex mutex;
  static std::unique_ptr<ThreadPool> pool;
  const std::lock_guard lock(mutex);
  if (pool == nullptr || pool->size() != at::get_num_threads())
    pool = std::make_unique<ThreadPool>(at::get_num_threads());
  return *pool;
}

}  // namespace kilin::train
