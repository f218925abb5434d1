// SPDX-License-Identifier: Apache-2.0
// Private to the conversions: what they take weights, configuration and tokenizer from.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "engine/convert.h"
#include "engine/convert_plan.h"
#include "engine/stored_parameter.h"
#include "io/checkpoint.h"
#include "io/gguf_writer.h"

namespace kilin {

// A model's files, opened and checked: every parameter is there, nothing else is.
struct ConvertSource {
  io::Checkpoint checkpoint;
  std::string config_text;
  Config config;
  std::vector<Parameter> parameters;
  std::vector<Dtype> dtypes;  // as stored, of each parameter

  static ConvertSource open(const std::string& path, const std::string& compatibility);
};

// Refuses configurations whose table of parameters would not fit into memory.
void check_table_size(const Config& config, const std::string& file);

// Tokenizer, chat template, names and the generation configuration, as far as the source has them.
void write_text_metadata(const ConvertSource& source, io::GgufWriter& writer);

// An Error if `path` exists and may not be overwritten, is a directory, or its directory is missing.
void check_target_file(const std::filesystem::path& path, bool overwrite);
// An Error if the file system of `path` has less room.
void check_space(const std::filesystem::path& path, uint64_t bytes);

}  // namespace kilin
