// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "base/thread_pool.h"

namespace kilin::train {

// The pool of our kernels in this process: as many threads as torch uses (at::set_num_threads).
ThreadPool& threads();

// Lets the process keep the memory that it frees (glibc), which every step otherwise gives back and asks for
// anew: about 5 % of a step on the CPU. For programs that train, before they do.
void keep_freed_memory();

}  // namespace kilin::train
