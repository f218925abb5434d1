// SPDX-License-Identifier: Apache-2.0
// LoRA (arXiv:2106.09685) on any matrix of the model, and PEFT's files of it.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fnmatch.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "io/json.h"
#include "io/output_directory.h"
#include "io/safetensors.h"
#include "train/initial_values.h"
#include "train/torch_files.h"
#include "train/torch_model_impl.h"

namespace kilin::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";

bool may_have_lora(Role role) {
  return role == Role::kProjection || role == Role::kExpert || role == Role::kHead;
}

std::string module_name(const std::string& parameter) {
  return parameter.substr(0, parameter.size() - std::string(".weight").size());
}

bool matches(const std::string& pattern, const std::string& module, Role role) {
  if (pattern == "all-linear") return role != Role::kHead;
  if (pattern.find_first_of("*?") != std::string::npos)
    return ::fnmatch(pattern.c_str(), module.c_str(), 0) == 0;
  return module == pattern || module.ends_with("." + pattern);
}

using Values = std::function<std::optional<at::Tensor>(const std::string& name, const Shape& shape)>;

void remove(TorchModel::Impl& model) {
  model.visit([](const Parameter&, TorchWeight& w) { w.lora_a = w.lora_b = at::Tensor(); });
  model.lora.clear();
  model.lora_options.reset();
  model.set_trainable();
}

// Adds A and B to the parameters for which `values` has an A.
void attach(TorchModel::Impl& model, int64_t rank, double scale, const Values& values) {
  const auto leaf = [&](const std::string& name, const Shape& shape, Role role) -> at::Tensor {
    const auto found = values(name, shape);
    if (!found) return {};
    at::Tensor t = found->to(model.options.device, model.options.dtype).requires_grad_(true);
    model.lora.push_back({name, t, role, shape});
    return t;
  };
  model.visit([&](const Parameter& p, TorchWeight& w) {
    if (!may_have_lora(p.role)) return;
    const std::string name = kPrefix + module_name(p.name);
    w.lora_a = leaf(name + ".lora_A.weight", {rank, p.shape[1]}, p.role);
    if (!w.lora_a.defined()) return;
    w.lora_b = leaf(name + ".lora_B.weight", {p.shape[0], rank}, p.role);
    w.lora_scale = scale;
  });
  model.set_trainable();
}

std::string adapter_config(const TorchModel::Impl& model, const std::string& base) {
  const LoraOptions& lora = *model.lora_options;
  nlohmann::ordered_json json = {{"peft_type", "LORA"}, {"task_type", "CAUSAL_LM"}};
  json["base_model_name_or_path"] = base;
  json["r"] = lora.rank;
  json["lora_alpha"] = lora.alpha;
  json["target_modules"] = nlohmann::json::array();
  for (const NamedTensor& t : model.lora) {
    const std::string end = ".lora_A.weight";
    if (t.name.ends_with(end))
      json["target_modules"].push_back(t.name.substr(
          std::string(kPrefix).size(), t.name.size() - std::string(kPrefix).size() - end.size()));
  }
  json["lora_dropout"] = 0.0;
  json["bias"] = "none";
  json["fan_in_fan_out"] = false;
  json["use_rslora"] = false;
  json["use_dora"] = false;
  json["inference_mode"] = true;
  return json.dump(2) + "\n";
}

at::Tensor tensor_of(const TensorView& view, const std::string& place) {
  const at::ScalarType type = view.dtype == Dtype::kF32    ? at::kFloat
                              : view.dtype == Dtype::kBF16 ? at::kBFloat16
                              : view.dtype == Dtype::kF16  ? at::kHalf
                                                           : at::kByte;
  check(type != at::kByte, "{}: found type {}, expected F32, BF16 or F16", place, dtype_name(view.dtype));
  at::Tensor t = at::empty(view.shape, type);
  std::memcpy(t.data_ptr(), view.data, view.bytes());
  return t;
}

}  // namespace

void TorchModel::add_lora(const LoraOptions& lora) {
  check(!has_lora(), "LoRA: the model has one already");
  check(lora.rank >= 1, "LoRA: rank is {}, expected at least 1", lora.rank);
  for (const std::string& pattern : lora.patterns) {
    bool found = false;
    for (const NamedTensor& p : impl_->parameters)
      found = found || (may_have_lora(p.role) && matches(pattern, module_name(p.name), p.role));
    check(found, "LoRA: '{}' names no matrix of the model (as q_proj, w1, or a name with *)", pattern);
  }
  check(!lora.patterns.empty(), "LoRA: no module is named");
  impl_->lora_options = lora;
  std::map<std::string, Role> roles;
  for (const NamedTensor& p : impl_->parameters) roles[p.name] = p.role;
  const auto values = [&](const std::string& name, const Shape& shape) -> std::optional<at::Tensor> {
    if (name.ends_with(".lora_B.weight")) return at::zeros(shape, at::kFloat);
    const std::string end = ".lora_A.weight", start = kPrefix;
    const std::string module = name.substr(start.size(), name.size() - start.size() - end.size());
    const Role role = roles.at(module + ".weight");
    for (const std::string& pattern : lora.patterns) {
      if (!matches(pattern, module, role)) continue;
      auto initial = initial_lora_a(name, shape[0], shape[1], lora.seed);
      return at::from_blob(initial.data(), shape, at::kFloat).clone();
    }
    return std::nullopt;
  };
  attach(*impl_, lora.rank, lora.alpha / static_cast<double>(lora.rank), values);
}

void TorchModel::merge_lora() {
  check(has_lora(), "LoRA: the model has none to merge");
  const c10::NoGradGuard no_gradients;
  impl_->visit([&](const Parameter&, TorchWeight& w) {
    if (!w.lora_a.defined()) return;
    const at::Tensor change = at::matmul(w.lora_b.to(at::kDouble), w.lora_a.to(at::kDouble)) * w.lora_scale;
    w.value.copy_(w.value.to(at::kDouble) + change);
  });
  remove(*impl_);
}

void TorchModel::save_lora(const std::string& directory, const std::string& base_model) const {
  check(has_lora(), "LoRA: the model has none to save");
  check(!fs::exists(directory) || fs::is_empty(directory) || fs::exists(fs::path(directory) / kConfigFile),
        "{}: is neither empty nor a directory of an adapter", directory);
  io::OutputDirectory out(directory, true, io::OutputDirectory::Appears::kAtOnce);
  write_tensors(out.add(kWeightsFile), impl_->lora, [](const NamedTensor&) { return at::kFloat; },
                {{"format", "pt"}});
  out.write(kConfigFile, adapter_config(*impl_, base_model));
  out.commit();
}

void TorchModel::load_lora(const std::string& directory) {
  check(!has_lora(), "LoRA: the model has one already");
  const auto json = io::JsonReader::open((fs::path(directory) / kConfigFile).string());
  if (json.string("peft_type") != "LORA") json.refuse("peft_type", "\"LORA\"");
  if (json.boolean_or("use_dora", false)) json.refuse("use_dora", "false (not computed)");
  if (json.string_or("bias", "none") != "none") json.refuse("bias", "\"none\"");
  LoraOptions lora;
  lora.rank = json.integer("r", 1, 1 << 16);
  lora.alpha = json.number("lora_alpha", 0.0, 1e9);
  const double rank = static_cast<double>(lora.rank);
  const double scale = lora.alpha / (json.boolean_or("use_rslora", false) ? std::sqrt(rank) : rank);
  const auto file = io::SafetensorsFile::open((fs::path(directory) / kWeightsFile).string());
  std::set<std::string> used;
  const auto value = [&](const std::string& name, const Shape& shape) -> std::optional<at::Tensor> {
    const TensorView* view = file.find(name);
    if (view == nullptr && name.ends_with(".lora_A.weight")) return std::nullopt;
    check(view != nullptr, "{}: tensor '{}' is missing", file.path(), name);
    check(view->shape == shape, "{}: tensor '{}': found shape {}, expected {}", file.path(), name,
          to_string(view->shape), to_string(shape));
    used.insert(name);
    return tensor_of(*view, file.path() + ": tensor '" + name + "'");
  };
  try {
    attach(*impl_, lora.rank, scale, value);
    for (const std::string& name : file.names())
      check(used.contains(name), "{}: tensor '{}' belongs to no matrix of the model", file.path(), name);
    check(!used.empty(), "{}: holds no LoRA matrices", file.path());
  } catch (...) {
    remove(*impl_);
    throw;
  }
  impl_->lora_options = lora;
}

}  // namespace kilin::train
