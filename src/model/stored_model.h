// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "model/parameters.h"

namespace kilin {

// A model's files, opened and checked: every parameter is there, nothing else is. For who reads it parameter
// by parameter (StoredParameter): conversions and the trainer.
struct StoredModel {
  io::Checkpoint checkpoint;
  std::string config_text;  // config.json, or what a GGUF file says in its place
  Config config;
  std::vector<Parameter> parameters;
  std::vector<Dtype> dtypes;  // as stored, of each parameter

  // A Hugging Face directory or a GGUF file. Throws Error, naming file and tensor or key.
  static StoredModel open(const std::string& path, const std::string& compatibility);
};

// The parameters of a model in the order of computation.
std::vector<Parameter> parameter_table(const Config& config);

// Refuses configurations whose table of parameters would not fit into memory.
void check_table_size(const Config& config, const std::string& file);

}  // namespace kilin
