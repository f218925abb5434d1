// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "model/config.h"

namespace kilin {

// The text of a config.json, in Moonshot's keys, from which read_config() makes the same configuration again.
// `dtype` is what transformers loads the weights as: "float32", "bfloat16" or "float16".
std::string config_text(const Config& config, const std::string& dtype);

// `text`, a config.json, for weights stored anew: says `dtype`, and names no Python code beside it
// (auto_map). Throws Error, naming `file`, if it is no JSON object.
std::string config_text_with_dtype(const std::string& text, const std::string& file,
                                   const std::string& dtype);

}  // namespace kilin
