// SPDX-License-Identifier: Apache-2.0
// Writing of a model: config.json and safetensors.
#include "train/torch_files.h"

#include <ATen/ATen.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "io/output_directory.h"
#include "io/safetensors_writer.h"
#include "model/config_text.h"
#include "train/torch_model_impl.h"

namespace kilin::train {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kShardBytes = uint64_t{4} << 30;

Dtype file_dtype(at::ScalarType type) {
  if (type == at::kFloat) return Dtype::kF32;
  if (type == at::kBFloat16) return Dtype::kBF16;
  if (type == at::kHalf) return Dtype::kF16;
  fail("saving a model: found type {}, expected float32, bfloat16 or float16", c10::toString(type));
}

const char* torch_name(at::ScalarType type) {
  return type == at::kFloat ? "float32" : type == at::kHalf ? "float16" : "bfloat16";
}

bool stays_float32(const std::string& name) {
  return name.ends_with("A_log") || name.ends_with("dt_bias") || name.ends_with("correction_bias");
}

struct Shard {
  std::vector<size_t> parameters;
  std::string file;
};

std::vector<Shard> shards_of(const std::vector<NamedTensor>& parameters, at::ScalarType type) {
  std::vector<Shard> shards(1);
  uint64_t bytes = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::ScalarType stored = stays_float32(parameters[i].name) ? at::kFloat : type;
    const uint64_t size = dtype_bytes(file_dtype(stored), element_count(parameters[i].shape));
    if (bytes > 0 && bytes + size > kShardBytes) {
      shards.emplace_back();
      bytes = 0;
    }
    bytes += size;
    shards.back().parameters.push_back(i);
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].file = shards.size() == 1
                         ? "model.safetensors"
                         : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
  }
  return shards;
}

std::string index_text(const std::vector<Shard>& shards, const std::vector<NamedTensor>& parameters,
                       uint64_t bytes) {
  nlohmann::json map = nlohmann::json::object();
  for (const Shard& shard : shards) {
    for (const size_t i : shard.parameters) map[parameters[i].name] = shard.file;
  }
  return nlohmann::json{{"metadata", {{"total_size", bytes}}}, {"weight_map", map}}.dump(1) + "\n";
}

std::string generation_text(const Config& config) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (config.bos_id) json["bos_token_id"] = *config.bos_id;
  if (!config.eos_ids.empty()) json["eos_token_id"] = config.eos_ids;
  return json.dump(2) + "\n";
}

using AddFile = std::function<std::string(const std::string&)>;  // the path of the file of this name

void write_text(const std::string& path, const std::string& text) {
  io::AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace

uint64_t write_tensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::function<at::ScalarType(const NamedTensor&)>& type_of,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<at::Tensor> kept;
  std::vector<io::NamedTensor> views;
  uint64_t bytes = 0;
  for (const NamedTensor& t : tensors) {
    const at::ScalarType type = type_of(t);
    kept.push_back(t.tensor.detach().to(at::kCPU, type).contiguous());
    views.push_back({t.name, {file_dtype(type), t.shape, kept.back().data_ptr()}});
    bytes += views.back().view.bytes();
  }
  io::write_safetensors(path, views, metadata);
  return bytes;
}

namespace {

void write_model(const TorchModel::Impl& model, at::ScalarType type, const AddFile& add) {
  file_dtype(type);
  check(model.lora.empty(), "saving a model: it has LoRA, which has to be merged (or saved alone) first");
  const auto shards = shards_of(model.parameters, type);
  const auto type_of = [&](const NamedTensor& t) { return stays_float32(t.name) ? at::kFloat : type; };
  uint64_t bytes = 0;
  for (const Shard& shard : shards) {
    std::vector<NamedTensor> tensors;
    for (const size_t i : shard.parameters) tensors.push_back(model.parameters[i]);
    bytes += write_tensors(add(shard.file), tensors, type_of, {{"format", "pt"}});
  }
  if (shards.size() > 1)
    write_text(add("model.safetensors.index.json"), index_text(shards, model.parameters, bytes));
  write_text(add("generation_config.json"), generation_text(model.config));
  write_text(add("config.json"), config_text_with_dtype(model.text, "config.json", torch_name(type)));
}

}  // namespace

void TorchModel::save(const std::string& directory, at::ScalarType dtype,
                      const std::vector<std::string>& also) const {
  check(!fs::exists(directory) || fs::is_empty(directory) || fs::exists(fs::path(directory) / "config.json"),
        "{}: is neither empty nor a model's directory", directory);
  io::OutputDirectory out(directory, true, io::OutputDirectory::Appears::kAtOnce);
  for (const std::string& file : also)
    out.write(fs::path(file).filename().string(), io::MappedFile(file).text());
  write_model(*impl_, dtype, [&](const std::string& name) { return out.add(name); });
  out.commit();
}

void TorchModel::save_into(const std::string& directory, at::ScalarType dtype) const {
  check(fs::is_directory(directory), "{}: is no directory", directory);
  write_model(*impl_, dtype, [&](const std::string& name) { return (fs::path(directory) / name).string(); });
}

}  // namespace kilin::train
