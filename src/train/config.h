// SPDX-License-Identifier: Apache-2.0
// What `kilin train` is asked to do: a TOML file, read and checked in full before anything is trained. The
// keys are described in docs/guides/training.md.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "eval/synthetic.h"
#include "model/config.h"
#include "train/schedule.h"
#include "train/toml.h"

namespace kilin::train {

// [run]
struct RunConfig {
  std::string out;  // the directory of checkpoints and logs
  uint64_t seed = 0;
  int64_t steps = 0;  // updates; the file may give tokens instead
  std::string device = "cpu";
  int threads = 0;  // 0: the physical cores
  int64_t log_every = 10;
  int64_t eval_every = 0;  // 0: at the end only, where there is held-out data
  int64_t save_every = 0;  // 0: at the end only
  int64_t keep = 2;        // checkpoints
  bool save_bf16 = false;  // weights of checkpoints as bfloat16 (exact ones lie beside them then)
};

enum class ModelFrom { kShape, kConfigFile, kCheckpoint };

// [model]
struct ModelSection {
  ModelFrom from = ModelFrom::kShape;
  std::string path;       // of config.json or of the checkpoint's directory
  std::string tokenizer;  // directory with the tokenizer that goes into checkpoints; empty: none
  Config shape;
};

enum class DataKind { kTokens, kText, kSynthetic, kChat };

// [data]
struct DataConfig {
  DataKind kind = DataKind::kTokens;
  std::vector<std::string> train, valid;  // files; synthetic: none
  int64_t sequence = 0;                   // tokens of a row of the batch
  bool split_documents = false;           // documents of one row do not see each other
  int64_t valid_sequences = 0;            // held-out rows that are evaluated; 0: all (synthetic: 64)
  eval::SyntheticConfig synthetic;
  std::vector<int64_t> examples_per_row;  // synthetic: see SyntheticRows
  std::vector<std::string> places;        // "train.toml:9" for [train..., valid...], for errors of files
};

enum class OptimizerKind { kAdamW, kMuon };

// [optimizer]
struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
  double weight_decay = 0.1;
  bool decay_all = false;  // else matrices only
  double clip = 1.0;       // of the gradient's norm; 0: no clipping
  double momentum = 0.95;  // muon
};

// [precision]
struct PrecisionConfig {
  bool autocast_bf16 = false;
  bool checkpoint_activations = false;
};

// [batch]
struct BatchConfig {
  int64_t sequences = 1;   // rows of one update, over all processes
  int64_t accumulate = 1;  // parts that a process computes one after the other
};

// [lora]
struct LoraConfig {
  int64_t rank = 8;
  double alpha = 16;
  std::vector<std::string> targets;  // LoraOptions::patterns of torch_model.h
  bool merge = false;                // write the merged model to OUT/merged at the end
  std::string place;                 // "train.toml:20" of targets
};

struct TrainConfig {
  std::string file;
  RunConfig run;
  ModelSection model;
  DataConfig data;
  OptimizerConfig optimizer;
  Schedule schedule;  // with the peak learning rate
  PrecisionConfig precision;
  BatchConfig batch;
  std::optional<LoraConfig> lora;
  double router_bias_rate = 0;              // [moe] bias_rate
  std::map<std::string, std::string> flat;  // every key as text: what a resumed run is compared with

  int64_t tokens_per_step() const { return batch.sequences * data.sequence; }
};

// Reads the file, applies `overrides` ("section.key=value") and checks all of it: keys, types, ranges, the
// shape of the model, that files exist. Throws Error "train.toml:LINE: key 'SECTION.KEY': ...".
TrainConfig read_train_config(const std::string& path, const std::vector<std::string>& overrides);
TrainConfig read_train_config(const TomlTable& root, const std::string& file);

// The keys in which two runs differ and that change what is trained, as "key 'optimizer.lr': 0.001, now
// 0.002".
std::vector<std::string> differences(const std::map<std::string, std::string>& before,
                                     const std::map<std::string, std::string>& now);

// ["kda", "kda", "kda", "mla"] for "3:1": the pattern that is repeated over the layers. `linear` names the
// layers of the first number. Throws std::invalid_argument for what is no ratio.
std::vector<std::string> ratio_pattern(const std::string& ratio, const std::string& linear);

}  // namespace kilin::train
