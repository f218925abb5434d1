// SPDX-License-Identifier: Apache-2.0
#include "engine/lora.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "io/json.h"
#include "kernels/norm/norm.h"
#include "model/alternatives.h"
#include "quant/formats.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kHalfA = ".lora_A.weight";
constexpr std::string_view kHalfB = ".lora_B.weight";
constexpr std::string_view kBase = ".base_layer.weight";
constexpr int64_t kMaxRank = 1 << 16;

struct LoraConfig {
  int64_t rank = 0;
  double scale = 0;
  std::vector<std::string> targets;  // ends of module names; empty: not checked
};

// null, false, 0, "", [] and {}: a feature that is not used
bool is_off(const nlohmann::json& value) {
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value == 0;
  return value.empty() || (value.is_string() && value.get_ref<const std::string&>().empty());
}

void check_initialisation(const io::JsonReader& json) {
  if (!json.has("init_lora_weights")) return json.ignore({"init_lora_weights"});
  const nlohmann::json& value = json.value("init_lora_weights");
  // Others (PiSSA, OLoRA, CorDA, LoftQ) change the base weights when they begin, which the adapter does not
  // hold.
  const bool known = value.is_boolean() || value == "gaussian" || value == "eva" || value == "orthogonal";
  if (!known) json.refuse("init_lora_weights", "true, false, \"gaussian\", \"eva\" or \"orthogonal\"");
}

LoraConfig read_lora_config(const std::string& path) {
  const io::JsonReader json = io::JsonReader::open(path);
  LoraConfig config;
  json.choice("peft_type", {"LORA"});
  config.rank = json.integer("r", 1, kMaxRank);
  const double alpha = json.number("lora_alpha", -1e9, 1e9);
  const auto rank = static_cast<double>(config.rank);
  config.scale = alpha / (json.boolean_or("use_rslora", false) ? std::sqrt(rank) : rank);
  if (json.has("target_modules") && json.value("target_modules").is_array()) {
    config.targets = json.strings("target_modules");
  }
  if (json.string_or("bias", "none") != "none") json.refuse("bias", "\"none\"");
  check_initialisation(json);
  // What says how it was trained, or which modules: the tensors say that too.
  json.ignore({"target_modules", "task_type", "base_model_name_or_path", "inference_mode", "lora_dropout",
               "revision", "auto_mapping", "peft_version", "layers_to_transform", "layers_pattern",
               "exclude_modules", "megatron_config", "megatron_core", "loftq_config", "eva_config",
               "corda_config", "runtime_config", "ensure_weight_tying", "qalora_group_size"});
  for (const std::string& key : json.unread_keys()) {
    if (!is_off(json.value(key))) json.refuse(key, "nothing: Kilin does not compute this");
  }
  return config;
}

void check_plain(const std::string& path, const std::string& name, const TensorView& view) {
  check(!is_quantized(view.dtype) && quant::readable(view.dtype),
        "{}: tensor '{}': found type {}, expected F32, F16 or BF16", path, name, dtype_name(view.dtype));
}

void check_view(const std::string& path, const std::string& name, const TensorView& view, size_t rank_at,
                int64_t rank) {
  check(view.shape.size() == 2 && view.shape[rank_at] == rank && view.elements() > 0,
        "{}: tensor '{}': found shape {}, expected {} (r in {})", path, name, to_string(view.shape),
        rank_at == 0 ? fmt::format("[{}, in]", rank) : fmt::format("[out, {}]", rank), kConfigFile);
}

std::vector<float> floats_of(const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.elements()));
  quant::dequantize(view.dtype, view.data, view.elements(), values.data());
  return values;
}

void check_finite(const std::string& path, const std::string& name, const TensorView& view) {
  check(all_finite(view.elements(), floats_of(view).data()), "{}: tensor '{}' holds NaN or infinity", path,
        name);
}

bool is_target(const std::string& module, const std::vector<std::string>& targets) {
  if (targets.empty()) return true;
  return std::any_of(targets.begin(), targets.end(),
                     [&](const std::string& t) { return module == t || module.ends_with("." + t); });
}

struct TensorName {
  std::string module;
  std::string_view part;  // kHalfA, kHalfB or kBase
};

// "base_model.model.X.lora_A.weight" -> "X", kHalfA
TensorName parse_name(const std::string& path, const std::string& name) {
  for (const std::string_view part : {kHalfA, kHalfB, kBase}) {
    const bool fits =
        name.starts_with(kPrefix) && name.ends_with(part) && name.size() > kPrefix.size() + part.size();
    if (fits) return {name.substr(kPrefix.size(), name.size() - kPrefix.size() - part.size()), part};
  }
  fail("{}: tensor '{}': expected a name {}MODULE{} or {}", path, name, kPrefix, kHalfA, kHalfB);
}

// Every name that a module may have, without ".weight". Parts of tensors have no module of their own.
std::map<std::string, Parameter> module_names(const Config& config) {
  constexpr std::string_view kWeight = ".weight";
  std::map<std::string, Parameter> modules;
  struct Nothing {};
  ModelWeights<Nothing> weights(config);
  visit_parameters(weights, config, [&](const Parameter& p, Nothing&) {
    for (const TensorSource& source : tensor_sources(p, config)) {
      const bool whole =
          source.offset == 0 && source.transform == Transform::kNone && source.shape == p.shape;
      if (!whole || !source.name.ends_with(kWeight)) continue;
      modules.emplace(source.name.substr(0, source.name.size() - kWeight.size()), p);
    }
  });
  return modules;
}

// The copy may have been rounded to a 16-bit type.
void check_base(const LoraAdapter::Pair& pair, std::span<const float> values) {
  if (pair.base.shape.empty()) return;
  const std::vector<float> copy = floats_of(pair.base);
  for (size_t i = 0; i < values.size(); ++i) {
    check(std::fabs(copy[i] - values[i]) <= std::fabs(values[i]) * 0x1p-7F + 1e-6F,
          "tensor '{}': the adapter's copy of the matrix differs from the model's (element {}: found {}, "
          "expected {}): "
          "it was made for another model",
          pair.name, i, copy[i], values[i]);
  }
}

bool adaptable(Role role) {
  return role == Role::kProjection || role == Role::kExpert || role == Role::kRouter || role == Role::kHead;
}

}  // namespace

LoraAdapter LoraAdapter::open(const LoraSource& source) {
  const fs::path directory(source.directory);
  check(fs::is_directory(directory), "{}: is no directory, expected that of a LoRA adapter ({}, {})",
        source.directory, kConfigFile, kWeightsFile);
  for (const char* file : {kConfigFile, kWeightsFile}) {
    check(fs::exists(directory / file), "{}: has no {}, expected a LoRA adapter as PEFT writes it",
          source.directory, file);
  }
  check(std::isfinite(source.scale), "{}: found scale {}, expected a finite number", source.directory,
        source.scale);
  const LoraConfig config = read_lora_config((directory / kConfigFile).string());
  const std::string path = (directory / kWeightsFile).string();
  LoraAdapter adapter(io::SafetensorsFile::open(path));
  adapter.directory_ = source.directory;
  adapter.rank_ = config.rank;
  adapter.scale_ = config.scale * source.scale;
  for (const std::string& name : adapter.file_.names()) {
    const auto [module, part] = parse_name(path, name);
    check(is_target(module, config.targets),
          "{}: tensor '{}': no module of this name is in target_modules of {}", path, name, kConfigFile);
    const TensorView& view = adapter.file_.get(name);
    check_plain(path, name, view);
    Pair& pair = adapter.pairs_[module];
    pair.scale = adapter.scale_;
    if (part == kBase) {
      pair.base = view;
      continue;
    }
    check_view(path, name, view, part == kHalfB ? 1 : 0, config.rank);
    check_finite(path, name, view);
    (part == kHalfB ? pair.b : pair.a) = view;
    if (part == kHalfB) pair.name = name;
  }
  check(!adapter.pairs_.empty(), "{}: found no tensors, expected those of at least one module", path);
  for (const auto& [module, pair] : adapter.pairs_) {
    const bool has_a = !pair.a.shape.empty();
    check(has_a && !pair.b.shape.empty(), "{}: tensor '{}{}{}' is missing, expected it beside the other half",
          path, kPrefix, module, has_a ? kHalfB : kHalfA);
  }
  return adapter;
}

LoraSet::LoraSet(std::span<const LoraSource> sources, const Config& config) {
  if (sources.empty()) return;
  const auto modules = module_names(config);
  for (const LoraSource& source : sources) adapters_.push_back(LoraAdapter::open(source));
  for (const LoraAdapter& adapter : adapters_) assign(adapter, modules);
}

void LoraSet::assign(const LoraAdapter& adapter, const std::map<std::string, Parameter>& modules) {
  const std::string path = (fs::path(adapter.directory()) / kWeightsFile).string();
  std::set<std::string> seen;
  for (const auto& [module, pair] : adapter.pairs()) {
    const auto found = modules.find(module);
    check(found != modules.end(), "{}: tensor '{}': the model has no matrix '{}'", path, pair.name, module);
    const Parameter& p = found->second;
    check(adaptable(p.role), "{}: tensor '{}': '{}' is {}, expected a matrix that is multiplied", path,
          pair.name, module,
          p.role == Role::kEmbedding ? "the embedding table" : "a convolution or a vector");
    const Shape shape{pair.b.shape[0], pair.a.shape[1]};
    check(shape == p.shape, "{}: tensor '{}': the pair gives a matrix {}, expected {}", path, pair.name,
          to_string(shape), to_string(p.shape));
    check(pair.base.shape.empty() || pair.base.shape == p.shape,
          "{}: the copy of '{}' has shape {}, expected {}", path, module, to_string(pair.base.shape),
          to_string(p.shape));
    check(seen.insert(p.name).second, "{}: tensor '{}': '{}' comes twice, under another name too", path,
          pair.name, p.name);
    by_parameter_[p.name].push_back(&pair);
  }
}

void LoraSet::add_to(const Parameter& parameter, std::span<float> values, ThreadPool& pool) const {
  const auto found = by_parameter_.find(parameter.name);
  if (found == by_parameter_.end()) return;
  for (const LoraAdapter::Pair* pair : found->second) check_base(*pair, values);
  for (const LoraAdapter::Pair* pair : found->second) {
    const auto rank = static_cast<size_t>(pair->a.shape[0]);
    const auto columns = static_cast<size_t>(pair->a.shape[1]);
    const int64_t rows = pair->b.shape[0];
    const std::vector<float> a = floats_of(pair->a);
    const std::vector<float> b = floats_of(pair->b);
    constexpr int64_t kRows = 16;  // of a task
    pool.parallel_for((rows + kRows - 1) / kRows, [&](int64_t task, int) {
      std::vector<float> delta(columns);
      for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
        std::fill(delta.begin(), delta.end(), 0.0F);
        const float* const b_row = b.data() + static_cast<size_t>(row) * rank;
        for (size_t k = 0; k < rank; ++k) {
          const float* const a_row = a.data() + k * columns;
          for (size_t i = 0; i < columns; ++i) delta[i] += b_row[k] * a_row[i];
        }
        float* const out = values.data() + static_cast<size_t>(row) * columns;
        const auto scale = static_cast<float>(pair->scale);
        for (size_t i = 0; i < columns; ++i) out[i] += scale * delta[i];
      }
    });
  }
  check(all_finite(static_cast<int64_t>(values.size()), values.data()),
        "{}: with the adapter '{}' holds NaN or infinity", adapters_.front().directory(), parameter.name);
}

}  // namespace kilin
