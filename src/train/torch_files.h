// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "train/torch_model.h"

namespace kilin::train {

// Writes a safetensors file, each tensor in the type that type_of says; returns the bytes of the tensors.
uint64_t write_tensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::function<at::ScalarType(const NamedTensor&)>& type_of,
                       const std::map<std::string, std::string>& metadata);

}  // namespace kilin::train
