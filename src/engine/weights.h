// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/float16.h"
#include "engine/lora.h"
#include "engine/packed_memory.h"
#include "io/checkpoint.h"
#include "kernels/matmul/matmul.h"
#include "kernels/moe/moe.h"
#include "model/alternatives.h"
#include "model/parameters.h"

namespace kilin {

// A parameter as the engine computes with it: matrices are packed once at load (kernels/matmul), in their
// stored type; the embedding table stays where the file is mapped; vectors and convolutions (transposed to
// [taps][channels]) are small and become float32.
struct Weight {
  WeightMatrix matrix;
  TensorView table;  // embedding only: [vocab][hidden], looked up by row
  const float* vector = nullptr;
};

// kv_b of a latent attention layer, a matrix per head: W_UK for the expanded order and transposed for the
// absorbed one, and W_UV (kernels/mla).
struct LatentHeads {
  std::vector<WeightMatrix> k_absorb;  // [heads] x [latent][nope]
  std::vector<WeightMatrix> k_expand;  // [heads] x [nope][latent]
  std::vector<WeightMatrix> value_up;  // [heads] x [value][latent]
};

struct NamedWeight {
  Parameter parameter;
  std::string source;  // tensor name in the checkpoint
  TensorView view;
};

// A parameter's values in the checkpoint: part of a tensor, or two tensors (Transform::kJoinHeads).
struct FoundTensor {
  TensorView view;
  Transform transform = Transform::kNone;
  TensorView second;
};

// Whether a random model keeps its values beside the packed weights, for table() (tests).
enum class StoredValues { kDrop, kKeep };

// A model's weights and what keeps them alive.
class LoadedModel {
 public:
  // Finds every parameter in the checkpoint, checks shapes and types, and refuses tensors that no parameter
  // uses. Packs with `threads` threads, 0: the physical cores. Matrices that an adapter changes are packed as
  // float32, the sum rounded nowhere else (docs/decisions/lora.md); table() has no data of them.
  static LoadedModel load(Config config, io::Checkpoint checkpoint, int threads = 0,
                          std::span<const LoraSource> lora = {});
  // bfloat16 values of random_values(). Without kKeep, views in table() but the embedding's have no data.
  static LoadedModel random(Config config, uint64_t seed, StoredValues values = StoredValues::kDrop,
                            int threads = 0);

  const Config& config() const { return config_; }
  const ModelWeights<Weight>& weights() const { return weights_; }
  const std::vector<ExpertWeights>& experts(int layer) const { return experts_[static_cast<size_t>(layer)]; }
  const std::optional<ExpertWeights>& shared(int layer) const { return shared_[static_cast<size_t>(layer)]; }
  const LatentHeads& latent_heads(int layer) const { return latent_heads_[static_cast<size_t>(layer)]; }
  const std::vector<NamedWeight>& table() const { return table_; }
  // Memory of the packed matrices.
  size_t packed_bytes() const { return packed_.bytes(); }
  const LoraSet& lora() const { return lora_; }
  // Name of the first tensor with a NaN or infinity, or "". Reads all weights.
  std::string first_not_finite() const;

 private:
  explicit LoadedModel(Config config);
  float* keep_floats(int64_t n);
  void bind_parameter(const Parameter& parameter, const FoundTensor& found, Weight& w);
  Weight bind(const Parameter& parameter, const FoundTensor& found);
  void bind_latent_heads(LatentHeads& heads, const FoundTensor& found);
  void bind_changed(const io::Checkpoint& checkpoint, const Parameter& parameter, Weight& w,
                    ThreadPool& pool);
  void collect_experts();

  Config config_;
  ModelWeights<Weight> weights_;
  std::vector<NamedWeight> table_;
  std::vector<std::vector<ExpertWeights>> experts_;
  std::vector<std::optional<ExpertWeights>> shared_;
  std::vector<LatentHeads> latent_heads_;
  PackedMemory packed_;
  LoraSet lora_;
  std::optional<io::Checkpoint> checkpoint_;
  std::deque<std::vector<float>> floats_;
  std::vector<std::unique_ptr<BFloat16[]>> random_values_;
};

}  // namespace kilin
