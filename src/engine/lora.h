// SPDX-License-Identifier: Apache-2.0
// Low-rank adapters as PEFT writes them: a directory with adapter_config.json and adapter_model.safetensors.
// An adapter of rank r adds s B A to a matrix [out][in], with tensors
//   base_model.model.<parameter name without .weight>.lora_A.weight [r][in], .lora_B.weight [out][r]
// and s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Hu et al. 2021, arXiv 2106.09685; rsLoRA:
// arXiv 2312.03732). Parameter names are those of model/parameters.h, or any other spelling that the loader
// takes. What it does to weights: docs/decisions/lora.md.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "io/safetensors.h"
#include "kilin/kilin.h"
#include "model/parameters.h"

namespace kilin {

class LoraAdapter {
 public:
  struct Pair {
    TensorView a;     // [rank][in], of a plain float type
    TensorView b;     // [out][rank]
    TensorView base;  // [out][in] or nothing: PEFT stores a copy of the head that it did not change
    double scale = 0;
    std::string name;  // of lora_B's tensor, for errors
  };

  // Reads and checks both files. Throws Error naming file and key or tensor: for what is no LoRA adapter, for
  // settings that Kilin does not compute (DoRA, biases, modules saved whole, patterns of ranks), a tensor of
  // another name, half of a pair, shapes that do not fit each other, values that are not finite.
  static LoraAdapter open(const LoraSource& source);

  const std::string& directory() const { return directory_; }
  int64_t rank() const { return rank_; }
  double scale() const { return scale_; }  // lora_alpha / r times the source's factor
  const std::map<std::string, Pair>& pairs() const {
    return pairs_;
  }  // by module: "model.layers.0.mlp.up_proj"

 private:
  std::string directory_;
  int64_t rank_ = 0;
  double scale_ = 0;
  std::map<std::string, Pair> pairs_;
  io::SafetensorsFile file_;

  explicit LoraAdapter(io::SafetensorsFile file) : file_(std::move(file)) {}
};

// Adapters on the parameters of one model.
class LoraSet {
 public:
  LoraSet() = default;
  LoraSet(LoraSet&&) noexcept = default;
  LoraSet& operator=(LoraSet&&) noexcept = default;
  LoraSet(const LoraSet&) = delete;  // by_parameter_ points into adapters_
  LoraSet& operator=(const LoraSet&) = delete;
  ~LoraSet() = default;
  // Throws Error when a module is no matrix of the model, or its shape another one.
  LoraSet(std::span<const LoraSource> sources, const Config& config);

  bool empty() const { return adapters_.empty(); }
  const std::vector<LoraAdapter>& adapters() const { return adapters_; }
  bool changes(const Parameter& parameter) const { return by_parameter_.contains(parameter.name); }
  int64_t changed() const { return static_cast<int64_t>(by_parameter_.size()); }

  // values [out][in] of `parameter` += s B A of every adapter, in float32. Throws Error when that is not
  // finite.
  void add_to(const Parameter& parameter, std::span<float> values, ThreadPool& pool) const;

 private:
  void assign(const LoraAdapter& adapter, const std::map<std::string, Parameter>& modules);

  std::vector<LoraAdapter> adapters_;
  std::map<std::string, std::vector<const LoraAdapter::Pair*>> by_parameter_;
};

}  // namespace kilin
