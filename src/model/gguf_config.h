// SPDX-License-Identifier: Apache-2.0
// The configuration of a model in the metadata of a GGUF file of architecture `kimi-linear`.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "io/gguf.h"
#include "io/gguf_writer.h"
#include "model/config.h"

namespace kilin {

// Kilin's own key: the text of config.json. llama.cpp's keys cannot say everything that Kilin computes
// (docs/decisions/gguf.md).
inline constexpr std::string_view kGgufConfigKey = "kilin.config";
// The text of generation_config.json, of which llama.cpp's keys keep one end token.
inline constexpr std::string_view kGgufGenerationConfigKey = "kilin.generation_config";

// From the key `kilin.config` if it is there (an Error if it contradicts llama.cpp's keys), otherwise from
// llama.cpp's keys alone. Every key that is missing or impossible is an Error that names file, key, found and
// expected; so is a key `kimi-linear.*` that is unknown and may change what the model computes. The epsilon
// of kv_a_layernorm, of which GGUF says nothing, follows `compat` as for config.json.
Config read_gguf_config(const io::GgufFile& file, const Compatibility& compat);

// The text of a config.json for the model: what `kilin.config` holds, or one made of llama.cpp's keys.
std::string gguf_config_text(const io::GgufFile& file);

// Writes general.architecture, llama.cpp's keys and `kilin.config`.
void write_gguf_config(const Config& config, std::string_view config_text, io::GgufWriter& writer);

// What of this configuration llama.cpp cannot express or compute, each as "bounded forget gate"; empty if it
// runs such a file.
std::vector<std::string> beyond_llama_cpp(const Config& config);

}  // namespace kilin
