// SPDX-License-Identifier: Apache-2.0
#include "train/model_section.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "base/error.h"
#include "io/json.h"
#include "model/config_text.h"

namespace kilin::train {
namespace {

constexpr const char* kCompatibility = "transformers";
constexpr int64_t kMaxRatio = 1024;

nlohmann::json to_json(const TomlValue& value) {
  struct Convert {
    nlohmann::json operator()(const TomlArray& list) const {
      nlohmann::json result = nlohmann::json::array();
      for (const TomlValue& item : list) result.push_back(to_json(item));
      return result;
    }
    nlohmann::json operator()(const TomlTable& table) const {
      nlohmann::json result = nlohmann::json::object();
      for (const auto& [key, item] : table) result[key] = to_json(item);
      return result;
    }
    nlohmann::json operator()(bool x) const { return x; }
    nlohmann::json operator()(int64_t x) const { return x; }
    nlohmann::json operator()(double x) const { return x; }
    nlohmann::json operator()(const std::string& x) const { return x; }
  };
  return std::visit(Convert{}, value.value);
}

// The lists of layers, which count from 1, from the key 'layers' of [model].
void put_layers(const TomlReader& section, nlohmann::json& json) {
  const std::string linear = section.choice_or("linear", "kda", {"kda", "gdn"});
  const int64_t count = section.integer("num_hidden_layers", 1, 4096);
  std::vector<std::string> pattern;
  try {
    const std::vector<std::string> given = section.strings("layers");
    if (given.empty()) section.refuse("layers", "a ratio such as \"3:1\" or a list of kda, gdn and mla");
    pattern = given.size() == 1 && given[0].find(':') != std::string::npos ? ratio_pattern(given[0], linear)
                                                                           : given;
  } catch (const std::invalid_argument&) {
    section.refuse("layers", "a ratio of linear to full attention layers, for example \"3:1\"");
  }
  nlohmann::json lists = {
      {"kda", nlohmann::json::array()}, {"gdn", nlohmann::json::array()}, {"mla", nlohmann::json::array()}};
  for (int64_t layer = 0; layer < count; ++layer) {
    const std::string& kind = pattern[static_cast<size_t>(layer) % pattern.size()];
    if (!lists.contains(kind)) section.refuse("layers", "the names kda, gdn and mla in the list");
    lists[kind].push_back(layer + 1);
  }
  nlohmann::json& linear_section = json["linear_attn_config"];
  linear_section["kda_layers"] = lists["kda"];
  linear_section["full_attn_layers"] = lists["mla"];
  if (!lists["gdn"].empty()) linear_section["gdn_layers"] = lists["gdn"];
}

// An error of the reader of config.json, "FILE: key 'hidden_size': ...", with the line and the key of the
// TOML.
[[noreturn]] void rethrow(const Error& error, const TomlReader& section) {
  std::string what = error.what();
  const std::string prefix = section.file() + ": ";
  if (what.starts_with(prefix)) what = what.substr(prefix.size());
  std::string place = section.file();
  if (what.starts_with("key '")) {
    const std::string path = what.substr(5, what.find('\'', 5) - 5);
    const size_t dot = path.find('.');
    place = dot == std::string::npos ? section.place(path)
                                     : section.section(path.substr(0, dot)).place(path.substr(dot + 1));
    what = "key 'model." + what.substr(5);
  }
  fail("{}: {}", place, what);
}

Config shape_from_keys(const TomlReader& section) {
  nlohmann::json json = {{"architectures", {"KimiLinearForCausalLM"}},
                         {"model_type", "kimi_linear"},
                         {"rms_norm_eps", 1e-5},
                         {"routed_scaling_factor", 1.0},
                         {"num_experts", 0},
                         {"linear_attn_config", nlohmann::json::object()}};
  for (const std::string& key : section.keys()) {
    if (key != "layers" && key != "linear" && key != "tokenizer") json[key] = to_json(*section.value(key));
  }
  put_layers(section, json);
  try {
    return read_config(io::JsonReader(json, section.file()), compatibility(kCompatibility));
  } catch (const Error& error) {
    rethrow(error, section);
  }
}

Config shape_from_file(const TomlReader& section, const std::string& key, const std::string& path) {
  std::error_code ignored;
  check(std::filesystem::is_regular_file(path, ignored), "{}: key '{}': file '{}' does not exist",
        section.place(key), section.key_path(key), path);
  try {
    return read_config_file(path, kCompatibility);
  } catch (const Error& error) {
    fail("{}: key '{}': {}", section.place(key), section.key_path(key), error.what());
  }
}

}  // namespace

std::vector<std::string> ratio_pattern(const std::string& ratio, const std::string& linear) {
  const size_t colon = ratio.find(':');
  const auto number = [](const std::string& text) {
    if (text.empty() || text.size() > 4 || text.find_first_not_of("0123456789") != std::string::npos)
      throw std::invalid_argument("no number");
    return std::stoll(text);
  };
  if (colon == std::string::npos) throw std::invalid_argument("no ratio");
  const int64_t first = number(ratio.substr(0, colon));
  const int64_t second = number(ratio.substr(colon + 1));
  if (first + second == 0 || first + second > kMaxRatio) throw std::invalid_argument("no ratio");
  std::vector<std::string> pattern(static_cast<size_t>(first), linear);
  pattern.insert(pattern.end(), static_cast<size_t>(second), "mla");
  return pattern;
}

ModelSection read_model_section(const TomlReader& section) {
  ModelSection model;
  if (section.has("checkpoint")) {
    model.from = ModelFrom::kCheckpoint;
    model.path = section.string("checkpoint");
    if (section.has("config")) section.refuse("config", "either 'checkpoint' or 'config', not both");
    model.shape = shape_from_file(section, "checkpoint", model.path + "/config.json");
  } else if (section.has("config")) {
    model.from = ModelFrom::kConfigFile;
    model.path = section.string("config");
    model.shape = shape_from_file(section, "config", model.path);
  } else {
    model.shape = shape_from_keys(section);
  }
  if (section.has("tokenizer")) {
    model.tokenizer = section.string("tokenizer");
    std::error_code ignored;
    check(std::filesystem::is_directory(model.tokenizer, ignored),
          "{}: key '{}': '{}' is no directory of a tokenizer", section.place("tokenizer"),
          section.key_path("tokenizer"), model.tokenizer);
  } else if (model.from == ModelFrom::kCheckpoint) {
    std::error_code ignored;
    const std::filesystem::path directory(model.path);
    if (std::filesystem::exists(directory / "tokenizer.json", ignored) ||
        std::filesystem::exists(directory / "tiktoken.model", ignored))
      model.tokenizer = model.path;
  }
  return model;
}

std::string shape_difference(const Config& found, const Config& expected) {
  const auto flat = [](const Config& config) {
    nlohmann::json json = nlohmann::json::parse(config_text(config, "float32"));
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) json.erase(key);
    return json.flatten();
  };
  const nlohmann::json a = flat(found);
  const nlohmann::json b = flat(expected);
  if (a == b) return "";
  for (const auto& [key, value] : a.items()) {
    if (!b.contains(key))
      return fmt::format("key '{}': found {}, expected none", key.substr(1), value.dump());
    if (b[key] != value)
      return fmt::format("key '{}': found {}, expected {}", key.substr(1), value.dump(), b[key].dump());
  }
  for (const auto& [key, value] : b.items()) {
    if (!a.contains(key))
      return fmt::format("key '{}': found none, expected {}", key.substr(1), value.dump());
  }
  return "";
}

}  // namespace kilin::train
