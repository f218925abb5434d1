// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "base/thread_pool.h"

namespace kilin::train {

// The pool of our kernels in this process: as many threads as torch uses (at::set_num_threads).
ThreadPool& threads();

}  // namespace kilin::train
