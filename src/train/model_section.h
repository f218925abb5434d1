// SPDX-License-Identifier: Apache-2.0
// [model] of a training configuration: a config.json, a checkpoint, or the shape written out with the keys of
// config.json.
#pragma once
#include "train/config.h"

namespace kilin::train {

ModelSection read_model_section(const TomlReader& section);

}  // namespace kilin::train
