// SPDX-License-Identifier: Apache-2.0
// Private to the conversions: what they take weights, configuration and tokenizer from.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "engine/convert.h"
#include "engine/convert_plan.h"
#include "io/gguf_writer.h"
#include "model/stored_model.h"
#include "model/stored_parameter.h"

namespace kilin {

using ConvertSource = StoredModel;

// Tokenizer, chat template, names and the generation configuration, as far as the source has them.
void write_text_metadata(const ConvertSource& source, io::GgufWriter& writer);

// An Error if `path` exists and may not be overwritten, is a directory, or its directory is missing.
void check_target_file(const std::filesystem::path& path, bool overwrite);
// An Error if the file system of `path` has less room.
void check_space(const std::filesystem::path& path, uint64_t bytes);

}  // namespace kilin
