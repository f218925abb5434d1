// SPDX-License-Identifier: Apache-2.0
// A model that can be trained: the text of model/blocks.h over libtorch (TorchOps), with its parameters,
// router statistics, LoRA adapters and files. No headers of torch but the tensor's.
//
// Parameters are leaves. Change their values in place only (copy_, add_ under NoGradGuard): the experts of a
// layer share one storage.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/parameters.h"

namespace kilin::train {

// Our kernels where there are any (float32 on the CPU; on Hopper GPUs bfloat16, in builds with KILIN_CUDA),
// or the recurrence token by token in torch's operations, for any type and device. Without a kernel for the
// case the second is taken, and one line on stderr says so.
enum class KdaPath { kKernel, kComposite };

struct ModelOptions {
  at::ScalarType dtype = at::kFloat;  // of the parameters: float32, or float64 (tests)
  at::Device device = at::kCPU;
  bool autocast_bf16 = false;  // matrix products in bfloat16; router, gates, norms, states float32
  bool checkpoint_activations =
      false;  // keep the inputs of layers only, compute the rest again: the same bits
  KdaPath kda_path = KdaPath::kKernel;
  std::string compatibility = "transformers";  // of files that are read (model/config.h)
};

// Fresh sequences one after another.
struct TrainBatch {
  at::Tensor tokens;                // int64 [rows], on any device
  std::vector<int32_t> cu_seqlens;  // [sequences + 1] rising from 0 to rows
  at::Tensor wanted;                // int64 [m], rows whose logits are asked for; undefined: all rows
};

struct NamedTensor {
  std::string name;   // Moonshot's spelling; of LoRA PEFT's
  at::Tensor tensor;  // leaf, shape as in the table. The router's bias never requires a gradient
  Role role;          // of a LoRA matrix that of the parameter it belongs to
  Shape shape;
};

// Tokens that chose each expert of a sparse layer.
struct RouterCounts {
  int layer;
  at::Tensor
      counts;  // int64 [experts], on the model's device; may be changed in place (summed over processes)
};

struct LoraOptions {
  // As PEFT's target_modules: a parameter's name without ".weight", or its end after a dot ("q_proj", "w1",
  // "experts.3.w2"), or a pattern with * and ? for the whole name; "all-linear": every projection and expert.
  std::vector<std::string> patterns;
  int64_t rank = 8;
  double alpha = 16.0;  // the product of A and B counts alpha / rank
  uint64_t seed = 0;
};

class TorchModel {
 public:
  // Initial values as published: matrices and the embedding normal(0, 0.02), convolutions uniform in
  // +-1/sqrt(taps) (torch's Conv1d, which flash-linear-attention uses), A_log = log U(1, 16), dt_bias the
  // inverse softplus of exp U(log 0.001, log 0.1), norms 1, the router's bias 0. The bits depend on seed,
  // names and shapes only.
  static TorchModel random(const Config& config, uint64_t seed, const ModelOptions& options);
  // A Hugging Face directory or GGUF file, any spelling of names, quantised or not.
  static TorchModel load(const std::string& path, const ModelOptions& options);

  TorchModel(TorchModel&&) noexcept;
  TorchModel& operator=(TorchModel&&) noexcept;
  ~TorchModel();

  // Logits [m][vocab], float32 (float64 if the parameters are). Throws Error for tokens, lengths or rows that
  // do not fit. With gradients on (torch's GradMode) it counts the router's choices.
  at::Tensor forward(const TrainBatch& batch);

  const Config& config() const;
  const ModelOptions& options() const;
  // All parameters in the order of the table, without LoRA matrices. With LoRA none requires a gradient.
  const std::vector<NamedTensor>& parameters() const;

  // One for every sparse layer: choices since the last reset.
  std::vector<RouterCounts>& router_counts();
  void reset_router_counts();
  // Adds `rate` to the bias of experts with fewer tokens than the mean, takes it from those with more, and
  // resets the counts (loss-free balancing, arXiv:2408.15664).
  void update_router_bias(double rate);

  // Freezes the model and adds to every parameter that a pattern names A (kaiming uniform) and B (zeros).
  // Throws Error for a pattern that names none, and if there is LoRA already.
  void add_lora(const LoraOptions& lora);
  bool has_lora() const;
  // Names as PEFT writes them: base_model.model.<name without .weight>.lora_A.weight [rank][in] and .lora_B
  // [out][rank].
  const std::vector<NamedTensor>& lora_parameters() const;
  // W += alpha / rank B A; then the model has no LoRA, and all parameters require gradients again.
  void merge_lora();
  // PEFT's directory: adapter_config.json, adapter_model.safetensors (float32). Whole or not at all.
  void save_lora(const std::string& directory, const std::string& base_model) const;
  // Adds the LoRA of such a directory.
  void load_lora(const std::string& directory);

  // A Hugging Face directory that transformers and `kilin run` load: config.json, generation_config.json,
  // model*.safetensors in Moonshot's names, and copies of the files `also` (a tokenizer). Matrices in `dtype`
  // (float32, bfloat16, float16); A_log, dt_bias and the router's bias are float32. It appears whole or not
  // at all; a model directory of this name is exchanged for it. With LoRA an Error: merge first.
  void save(const std::string& directory, at::ScalarType dtype,
            const std::vector<std::string>& also = {}) const;
  // The same files into a directory that exists and that the caller gives its name when it is complete.
  void save_into(const std::string& directory, at::ScalarType dtype) const;

  class Impl;  // private to the room

 private:
  explicit TorchModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kilin::train
