// SPDX-License-Identifier: Apache-2.0
// [model] of a training configuration: a config.json, a checkpoint, or the shape written out with the keys of
// config.json.
#pragma once
#include "train/config.h"

namespace kilin::train {

ModelSection read_model_section(const TomlReader& section);

// The first key of config.json in which two shapes differ, as "key 'hidden_size': found 32, expected 48"; ""
// when they are the same. Ids of special tokens do not count.
std::string shape_difference(const Config& found, const Config& expected);

}  // namespace kilin::train
