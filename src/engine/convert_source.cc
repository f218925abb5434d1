// SPDX-License-Identifier: Apache-2.0
#include "engine/convert_source.h"

#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <system_error>

#include "base/error.h"
#include "io/mapped_file.h"
#include "model/gguf_config.h"
#include "text/chat_template.h"
#include "text/gguf_tokenizer.h"
#include "text/tokenizer.h"

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

// Metadata that describes the model or its text, to be copied from one GGUF file to the next.
bool goes_along(std::string_view key) {
  constexpr std::array<std::string_view, 5> kWrittenAnew{"general.architecture", "general.type",
                                                         "general.file_type", "general.quantization_version",
                                                         "general.alignment"};
  if (std::find(kWrittenAnew.begin(), kWrittenAnew.end(), key) != kWrittenAnew.end()) return false;
  if (key == kGgufConfigKey) return false;
  return key.starts_with("general.") || key.starts_with("tokenizer.") || key.starts_with("kilin.");
}

// Integers and floats take the widths that ggml's own tools write.
class CopyValue {
 public:
  CopyValue(const std::string& file, const std::string& key, io::GgufWriter& writer)
      : file_(file), key_(key), writer_(writer) {}

  void operator()(int64_t value) const {
    check(value >= 0 && value <= std::numeric_limits<uint32_t>::max(),
          "{}: key '{}': found {}, expected 0 to 4294967295", file_, key_, value);
    writer_.add_uint32(key_, static_cast<uint32_t>(value));
  }
  void operator()(double value) const { writer_.add_float32(key_, static_cast<float>(value)); }
  void operator()(bool value) const { writer_.add_bool(key_, value); }
  void operator()(const std::string& value) const { writer_.add_string(key_, value); }
  void operator()(const io::GgufArray& array) const { std::visit(*this, array); }
  void operator()(const std::vector<int64_t>& values) const {
    std::vector<int32_t> narrow;
    for (const int64_t value : values) {
      check(value == static_cast<int32_t>(value), "{}: key '{}': found {}, expected a 32-bit integer", file_,
            key_, value);
      narrow.push_back(static_cast<int32_t>(value));
    }
    writer_.add_int32s(key_, narrow);
  }
  void operator()(const std::vector<double>& values) const {
    writer_.add_float32s(key_, std::vector<float>(values.begin(), values.end()));
  }
  void operator()(const std::vector<std::string>& values) const { writer_.add_strings(key_, values); }
  void operator()(const std::vector<bool>&) const {}  // nobody writes such a key

 private:
  const std::string& file_;
  const std::string& key_;
  io::GgufWriter& writer_;
};

void write_directory_text(const fs::path& directory, const Config& config, io::GgufWriter& w) {
  w.add_string("general.name", fs::canonical(directory).filename().string());
  if (const fs::path file = directory / "generation_config.json"; fs::exists(file)) {
    w.add_string(kGgufGenerationConfigKey, file_text(file));
  }
  if (!fs::exists(directory / "tokenizer.json") && !fs::exists(directory / "tiktoken.model")) {
    w.add_string("tokenizer.ggml.model", "none");  // llama.cpp's "no_vocab"
    return;
  }
  text::write_gguf_tokenizer(text::Tokenizer::load_parts(directory), static_cast<int32_t>(config.vocab_size),
                             w);
  if (const auto found = text::ChatTemplate::load_text(directory)) text::write_gguf_chat_template(*found, w);
}

}  // namespace

ConvertSource ConvertSource::open(const std::string& path, const std::string& compat) {
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

  ConvertSource source{std::move(checkpoint), std::move(text), std::move(config), {}, {}};
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

void write_text_metadata(const ConvertSource& source, io::GgufWriter& w) {
  const io::GgufFile* gguf = source.checkpoint.gguf();
  if (gguf == nullptr) return write_directory_text(source.checkpoint.path(), source.config, w);
  for (const auto& [key, value] : gguf->metadata()) {
    if (goes_along(key)) std::visit(CopyValue(gguf->path(), key, w), value);
  }
}

void check_target_file(const fs::path& path, bool overwrite) {
  check(!path.empty(), "(empty file name): expected the name of a GGUF file");
  check(!fs::is_directory(path), "{}: is a directory, expected the name of a GGUF file", path.string());
  check(overwrite || !fs::exists(fs::symlink_status(path)), "{}: exists already (--force overwrites it)",
        path.string());
}

void check_space(const fs::path& path, uint64_t bytes) {
  std::error_code ignored;
  const fs::path directory = fs::absolute(path).parent_path();
  const fs::space_info space = fs::space(directory, ignored);
  if (ignored) return;  // the write itself will tell
  check(space.available >= bytes, "{}: no space left on device: {} bytes needed, {} free", path.string(),
        bytes, space.available);
}

}  // namespace kilin
