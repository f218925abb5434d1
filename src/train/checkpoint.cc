// SPDX-License-Identifier: Apache-2.0
#include "train/checkpoint.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <filesystem>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "io/safetensors.h"
#include "train/torch_files.h"

namespace kilin::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr const char* kMaster = "master.";

std::string optimizer_file(const std::string& directory) { return directory + "/" + kOptimizerFile; }

// What a checkpoint's other files do not hold exactly.
std::vector<NamedTensor> exact_state(const TrainConfig& config, const TorchModel& model,
                                     const Optimizer& optimizer) {
  std::vector<NamedTensor> tensors;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    tensors.push_back({name, tensor.detach(), Role::kVector, tensor.sizes().vec()});
  };
  for (const auto& [name, tensor] : optimizer.state()) add(name, tensor);
  if (config.run.save_bf16 && !model.has_lora()) {
    for (const NamedTensor& p : model.parameters()) add(kMaster + p.name, p.tensor);
  }
  return tensors;
}

void copy_file(const std::string& from, const std::string& to) {
  const io::MappedFile source(from);
  io::AtomicFile file(to);
  file.write(source.text());
  file.commit();
}

void fill(const io::SafetensorsFile& file, const std::string& name, const at::Tensor& tensor) {
  const TensorView& view = file.get(name);
  const Dtype expected = tensor.scalar_type() == at::kDouble ? Dtype::kF64 : Dtype::kF32;
  check(view.dtype == expected && view.shape == Shape(tensor.sizes().vec()),
        "{}: tensor '{}': found {} {}, expected {} {}", file.path(), name, dtype_traits(view.dtype).name,
        to_string(view.shape), dtype_traits(expected).name, to_string(tensor.sizes().vec()));
  const c10::NoGradGuard no_grad;
  tensor.copy_(at::from_blob(const_cast<void*>(view.data), tensor.sizes(), tensor.scalar_type()));
}

}  // namespace

std::vector<std::string> tokenizer_files(const std::string& directory) {
  std::vector<std::string> files;
  if (directory.empty()) return files;
  for (const char* name : {"tokenizer.json", "tiktoken.model", "tokenizer_config.json",
                           "special_tokens_map.json", "chat_template.jinja"}) {
    const std::string path = (fs::path(directory) / name).string();
    std::error_code ignored;
    if (fs::is_regular_file(path, ignored)) files.push_back(path);
  }
  return files;
}

void write_checkpoint(const RunDirectory& run, const TrainConfig& config, const TorchModel& model,
                      const Optimizer& optimizer, const TrainerState& state) {
  const std::string directory = run.begin(state.step);
  if (model.has_lora()) {
    model.save_lora(directory, fs::absolute(config.model.path).lexically_normal().string());
  } else {
    model.save_into(directory, config.run.save_bf16 ? at::kBFloat16 : at::kFloat);
    for (const std::string& file : tokenizer_files(config.model.tokenizer))
      copy_file(file, directory + "/" + fs::path(file).filename().string());
  }
  write_tensors(optimizer_file(directory), exact_state(config, model, optimizer),
                [](const NamedTensor& p) { return p.tensor.scalar_type(); }, {{"format", "pt"}});
  run.commit(state, config.run.keep);
}

TorchModel load_checkpoint_model(const std::string& directory, const TrainConfig& config,
                                 const ModelOptions& options) {
  if (!config.lora) return TorchModel::load(directory, options);
  TorchModel model = TorchModel::load(config.model.path, options);
  model.load_lora(directory);
  return model;
}

void restore_exactly(const std::string& directory, const TorchModel& model, Optimizer& optimizer,
                     int64_t updates) {
  const auto file = io::SafetensorsFile::open(optimizer_file(directory));
  size_t used = 0;
  for (const auto& [name, tensor] : optimizer.state()) {
    fill(file, name, tensor);
    ++used;
  }
  for (const NamedTensor& p : model.parameters()) {
    if (!file.contains(kMaster + p.name)) continue;
    fill(file, kMaster + p.name, p.tensor);
    ++used;
  }
  check(used == file.names().size(), "{}: found {} tensors, expected the {} of this model and optimizer",
        file.path(), file.names().size(), used);
  optimizer.restore(updates);
}

}  // namespace kilin::train
