// SPDX-License-Identifier: Apache-2.0
// Values of models with random weights (kilin convert --random).
#pragma once
#include <cstdint>

#include "model/parameters.h"

namespace kilin {

// Elements [first, first + n) of a parameter of a model with random weights, the same for any division into
// parts: matrices uniform with deviation 0.02; the gate parameters as flash-linear-attention initialises KDA
// (e^A_log uniform in [1, 16), time constants log-uniform in [0.001, 0.1]); norms 1, the router's bias 0.
void random_values(const Parameter& parameter, uint64_t seed, int64_t first, int64_t n, float* out);

}  // namespace kilin
