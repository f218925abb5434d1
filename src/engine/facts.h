// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "engine/engine.h"
#include "kilin/kilin.h"

namespace kilin {

// Sizes and choices of a loaded model, for `kilin info` and benchmarks.
ModelInfo model_facts(const Engine& engine, const std::string& path);

}  // namespace kilin
