// SPDX-License-Identifier: Apache-2.0
// kilin info: what a checkpoint is and what it costs.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(Active: what one token uses (chosen experts, output head), without the embedding
table. The state of KDA layers does not grow with the text; the cache of MLA
layers grows by the given bytes per token.

Examples:
  kilin info models/kilin-docs-10m
  kilin info models/kilin-docs-10m --json | python3 -m json.tool)";

constexpr std::array<std::pair<const char*, int64_t>, 3> kLengths{
    {{"4,096", 4096}, {"131,072", 131072}, {"1,048,576", 1048576}}};

int64_t sequence_bytes(const ModelInfo& info, int64_t length) {
  return info.state_bytes_per_sequence + info.cache_bytes_per_token * length;
}

nlohmann::ordered_json to_json(const Model& model) {
  const ModelInfo& info = model.info();
  nlohmann::ordered_json json;
  json["path"] = info.path;
  json["architecture"] = info.architecture;
  json["compatibility"] = info.compatibility;
  json["layers"] = info.layers;
  json["kda_layers"] = info.kda_layers;
  json["gdn_layers"] = info.gdn_layers;
  json["mla_layers"] = info.mla_layers;
  json["moe_layers"] = info.moe_layers;
  json["hidden_size"] = info.hidden_size;
  json["vocab_size"] = info.vocab_size;
  json["max_length"] = info.max_length;
  json["parameters"] = info.parameters;
  json["active_parameters"] = info.active_parameters;
  json["weight_bytes"] = info.weight_bytes;
  json["active_weight_bytes"] = info.active_weight_bytes;
  json["activations"] = info.activations;
  json["state_bytes_per_sequence"] = info.state_bytes_per_sequence;
  json["cache_bytes_per_token"] = info.cache_bytes_per_token;
  for (const auto& [name, length] : kLengths) {
    json["sequence_bytes"][std::to_string(length)] = sequence_bytes(info, length);
  }
  json["tokenizer"] = model.has_tokenizer();
  json["chat_template"] = model.has_chat_template();
  json["details"] = nlohmann::ordered_json::object();
  for (const auto& [name, value] : info.details) json["details"][name] = value;
  return json;
}

using Rows = std::vector<std::pair<std::string, std::string>>;

std::string count_and_unit(int64_t count) {
  return count < 1000 ? with_commas(count)
                      : fmt::format("{} ({})", with_commas(count), human_count(static_cast<double>(count)));
}

std::string bytes_and_unit(int64_t bytes) {
  const std::string exact = with_commas(bytes) + " bytes";
  return bytes < 1024 ? exact : fmt::format("{} ({})", exact, human_bytes(static_cast<double>(bytes)));
}

std::string layer_kinds(const ModelInfo& info) {
  std::string text = fmt::format("{} (", info.layers);
  const auto add = [&](int64_t count, const char* name) {
    if (count > 0) text += fmt::format("{}{} {}", text.back() == '(' ? "" : ", ", count, name);
  };
  add(info.kda_layers, "KDA");
  add(info.gdn_layers, "GDN");
  add(info.mla_layers, "MLA");
  return text + fmt::format("; {} with experts)", info.moe_layers);
}

Rows table(const Model& model) {
  const ModelInfo& info = model.info();
  Rows rows{{"model", info.path},
            {"architecture", info.architecture},
            {"agrees with", info.compatibility},
            {"layers", layer_kinds(info)},
            {"hidden size", with_commas(info.hidden_size)},
            {"vocabulary", with_commas(info.vocab_size)},
            {"longest text", with_commas(info.max_length) + " tokens"},
            {"parameters", count_and_unit(info.parameters)},
            {"  active", count_and_unit(info.active_parameters)},
            {"weights", bytes_and_unit(info.weight_bytes)},
            {"  read per token", bytes_and_unit(info.active_weight_bytes)},
            {"state per text", bytes_and_unit(info.state_bytes_per_sequence)},
            {"cache per token", bytes_and_unit(info.cache_bytes_per_token)}};
  for (const auto& [name, length] : kLengths) {
    rows.emplace_back(fmt::format("  text of {} tokens", name),
                      human_bytes(static_cast<double>(sequence_bytes(info, length))));
  }
  rows.emplace_back("tokenizer", model.has_tokenizer() ? "yes" : "none");
  rows.emplace_back("chat template", model.has_chat_template() ? "yes" : "none");
  rows.insert(rows.end(), info.details.begin(), info.details.end());
  return rows;
}

void print_table(const Rows& rows) {
  size_t width = 0;
  for (const auto& row : rows) width = std::max(width, row.first.size());
  std::string text;
  for (const auto& [name, value] : rows) text += fmt::format("{:<{}}  {}\n", name, width, value);
  write_out(text);
}

}  // namespace

Command add_info(const App& parent) {
  struct Options {
    ModelArguments model;
    bool json = false;
  };
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("info", "show what a checkpoint is and what it costs");
  app.footer(kFooter);
  add_model_argument(app, options->model);
  app.add_flag("--json", options->json, "print one JSON object");
  add_engine_options(app, options->model);
  return {app, [options] {
            const Model model = load_model(options->model, false);
            if (options->json) {
              write_json_line(to_json(model));
            } else {
              print_table(table(model));
            }
            return 0;
          }};
}

}  // namespace kilin::cli
