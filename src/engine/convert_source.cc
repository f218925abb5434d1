// SPDX-License-Identifier: Apache-2.0
#include "engine/convert_source.h"

#include <algorithm>
#include <array>
#include <limits>
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
