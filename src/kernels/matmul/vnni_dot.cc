// SPDX-License-Identifier: Apache-2.0
// Compiled with AVX-512 (cmake/isa.cmake); runs only where base/cpu.h found VNNI.
#include "kernels/matmul/integers_dot.h"
#include "kernels/matmul/vnni.h"

namespace kilin::vnni {

void dot_integers(const MatmulJob& job, PanelRange panels, const ByteBlock* x) {
  avx512::dot_blocks(job, panels, x);
}

}  // namespace kilin::vnni
