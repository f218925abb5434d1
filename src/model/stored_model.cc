// SPDX-License-Identifier: Apache-2.0
#include "model/stored_model.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "io/mapped_file.h"
#include "model/gguf_config.h"
#include "model/stored_parameter.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

std::string file_text(const fs::path& path) { return std::string(io::MappedFile(path.string()).text()); }

void check_all_used(const io::Checkpoint& checkpoint, const std::set<std::string>& used) {
  for (const std::string& name : checkpoint.names()) {
    if (used.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    fail("{}: tensor '{}' belongs to no parameter of the model that the configuration describes",
         checkpoint.path(), name);
  }
}

struct Nothing {};

}  // namespace

std::vector<Parameter> parameter_table(const Config& config) {
  std::vector<Parameter> parameters;
  ModelWeights<Nothing> weights(config);
  visit_parameters(weights, config, [&](const Parameter& p, Nothing&) { parameters.push_back(p); });
  return parameters;
}

StoredModel StoredModel::open(const std::string& path, const std::string& compat) {
  check(fs::exists(path), "{}: no such file or directory", path);
  const fs::path config_file = fs::path(path) / "config.json";
  check(!fs::is_directory(path) || fs::exists(config_file),
        "{}: has no config.json, expected a Hugging Face model directory or a GGUF file", path);
  check(fs::is_directory(path) || io::GgufFile::is_gguf(path),
        "{}: is no GGUF file, expected one or a Hugging Face model directory", path);
  io::Checkpoint checkpoint = io::Checkpoint::open(path);
  const io::GgufFile* gguf = checkpoint.gguf();
  std::string text = gguf != nullptr ? gguf_config_text(*gguf) : file_text(config_file);
  Config config = gguf != nullptr ? read_gguf_config(*gguf, kilin::compatibility(compat))
                                  : read_config_file(config_file.string(), compat);
  // The table is sized by the configuration, so that has to be plausible first (a 4-bit weight takes at least
  // half a byte).
  const double least_bytes = config.least_parameters() / 2;
  check(least_bytes <= static_cast<double>(checkpoint.total_bytes()) + 5e5,
        "{}: holds {} bytes of tensors, but its configuration describes a model of at least {:.0f}", path,
        checkpoint.total_bytes(), least_bytes);
  check_table_size(config, path);

  StoredModel source{std::move(checkpoint), std::move(text), std::move(config), {}, {}};
  source.parameters = parameter_table(source.config);
  std::set<std::string> used;
  for (const Parameter& p : source.parameters) {
    const auto stored = StoredParameter::find(source.checkpoint, p, source.config);
    source.dtypes.push_back(stored.dtype());
    used.insert(stored.tensors().begin(), stored.tensors().end());
  }
  check_all_used(source.checkpoint, used);
  return source;
}

void check_table_size(const Config& c, const std::string& file) {
  const int64_t experts = std::count(c.sparse.begin(), c.sparse.end(), true) * c.moe.experts;
  check(experts <= 1 << 21, "{}: describes {} experts, expected at most {}", file, experts, 1 << 21);
}

}  // namespace kilin
