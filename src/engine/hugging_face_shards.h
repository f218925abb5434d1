// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face directory: safetensors files of about 1 GiB and their index.
#pragma once
#include <cstddef>
#include <vector>

#include "engine/convert_source.h"
#include "engine/lora.h"
#include "io/output_directory.h"

namespace kilin {

struct ShardPiece {
  size_t parameter;  // of ConvertSource::parameters
  Dtype dtype;
};
using Shards = std::vector<std::vector<ShardPiece>>;

// Parameters in their order, and the type of each; counts them in `report`. kAuto: as stored, quantised ones
// as bfloat16.
Shards divide_into_shards(const ConvertSource& source, WeightType type, const LoraSet& lora,
                          ConvertReport& report);

// Writes the files, with the adapters of `lora` added. False when the user's callback asked to stop.
bool write_shards(const ConvertSource& source, const ConvertOptions& options, const Shards& shards,
                  const LoraSet& lora, uint64_t total_bytes, io::OutputDirectory& out);

}  // namespace kilin
