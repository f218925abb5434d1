// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/parameters.h"

namespace kilin::train {

// All values of a parameter of a model before training (TorchModel::random says which), from seed, name and
// shape alone.
std::vector<float> initial_values(const Parameter& parameter, uint64_t seed);

// LoRA's A: uniform in +-1/sqrt(columns), torch's kaiming_uniform_(a = sqrt 5).
std::vector<float> initial_lora_a(const std::string& name, int64_t rows, int64_t columns, uint64_t seed);

}  // namespace kilin::train
