// SPDX-License-Identifier: Apache-2.0
// Between the files of models: Hugging Face directories and GGUF, in full or fewer bits. Tensor by tensor: no
// model is ever in memory as a whole. Errors name the file and the tensor, key or value.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kilin/kilin.h"
#include "tensor/dtype.h"

namespace kilin {

// How matrices are stored. Vectors, convolutions and the router are float32 in every case, and some matrices
// keep more bits than the name says: docs/decisions/gguf.md.
// NOLINTNEXTLINE(readability-identifier-naming): the formats' own names
enum class WeightType { kAuto, kF32, kBF16, kQ8_0, kQ4_0, kQ4_K };

struct ConvertOptions {
  WeightType type = WeightType::kAuto;  // kAuto: as the source has it
  int threads = 0;                      // 0: the physical cores
  bool overwrite = false;               // an output that exists is an Error otherwise
  std::string compatibility = "transformers";
  // Hears the number of elements done and of all; return false to stop (nothing is left behind).
  std::function<bool(int64_t done, int64_t total)> progress;
};

struct StoredShare {
  int64_t tensors = 0;
  int64_t elements = 0;
  uint64_t bytes = 0;
};

// What the tensors of a quantised type lost.
struct QuantizationLoss {
  double relative = 0;  // root of the mean square, of the weights'
  double worst = 0;     // the same of the tensor that lost most
  std::string worst_tensor;
  double of_bound = 0;  // the largest error, of what the format allows (quant::error_bound)
};

struct ConvertReport {
  bool cancelled = false;
  uint64_t source_bytes = 0;  // of all tensors; 0 for random weights
  uint64_t target_bytes = 0;
  std::map<Dtype, StoredShare> shares;       // of the target
  std::map<Dtype, QuantizationLoss> losses;  // of tensors that were quantised here
  int64_t fallbacks = 0;           // tensors of a wider type than wanted: rows do not fill its blocks
  std::vector<std::string> notes;  // what the user should know, one line each
};

// source: a Hugging Face directory or a GGUF file; its tokenizer and chat template go along.
ConvertReport convert_to_gguf(const std::string& source, const std::string& target,
                              const ConvertOptions& options);

// Random weights for the shape in a config.json, without a tokenizer: for measuring speed.
ConvertReport random_gguf(const std::string& config_path, uint64_t seed, const std::string& target,
                          const ConvertOptions& options);

// A Hugging Face directory: config.json, safetensors (quantised weights become bfloat16), tokenizer files,
// generation_config.json. `directory` is made; one that exists must be empty, unless options.overwrite:
// then it is exchanged for the new one once that is complete (output_directory.h).
ConvertReport convert_to_hugging_face(const std::string& source, const std::string& directory,
                                      const ConvertOptions& options);

// A Hugging Face directory of the model with the adapter added to its weights, every sum rounded once to the
// type that is written (kAuto: that of the source, quantised ones become bfloat16). Tokenizer, chat template,
// generation configuration, licences and code files (*.py) of a source directory go along.
ConvertReport merge_lora(const std::string& source, const LoraSource& adapter, const std::string& directory,
                         const ConvertOptions& options);

}  // namespace kilin
