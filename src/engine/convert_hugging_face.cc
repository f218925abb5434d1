// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "engine/convert_source.h"
#include "io/output_directory.h"
#include "io/safetensors_writer.h"
#include "model/gguf_config.h"
#include "quant/formats.h"
#include "text/chat_template.h"
#include "text/gguf_tokenizer.h"

namespace kilin {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kShardBytes = uint64_t{1} << 30;  // held in memory while it is written
constexpr int64_t kPiece = 1 << 16;
constexpr const char* kIndexFile = "model.safetensors.index.json";

// GGUF has vectors, convolutions and the router as float32. Where every value is a bfloat16 they were stored
// so, and become so again; the parameters that checkpoints have as float32 stay float32.
bool may_become_bfloat16(const Parameter& p) {
  if (p.name.ends_with("A_log") || p.name.ends_with("dt_bias") || p.name.ends_with("correction_bias"))
    return false;
  return p.role == Role::kVector || p.role == Role::kConv || p.role == Role::kRouter;
}

bool all_bfloat16(const StoredParameter& stored) {
  std::vector<float> x(kPiece);
  for (int64_t first = 0; first < stored.elements(); first += kPiece) {
    const int64_t n = std::min(kPiece, stored.elements() - first);
    stored.read(first, n, x.data());
    const bool exact =
        std::all_of(x.begin(), x.begin() + n, [](float v) { return to_float(to_bfloat16(v)) == v; });
    if (!exact) return false;
  }
  return true;
}

Dtype target_dtype(const Parameter& p, const StoredParameter& stored, WeightType type) {
  const bool matrix = p.role != Role::kVector && p.role != Role::kConv && p.role != Role::kRouter;
  if (matrix && type == WeightType::kF32) return Dtype::kF32;
  if (matrix && type == WeightType::kBF16) return Dtype::kBF16;
  if (is_quantized(stored.dtype())) return Dtype::kBF16;
  if (stored.dtype() == Dtype::kF32 && may_become_bfloat16(p) && all_bfloat16(stored)) return Dtype::kBF16;
  return stored.dtype();
}

struct Piece {
  size_t parameter;
  Dtype dtype;
};

class ShardWriter {
 public:
  ShardWriter(const ConvertSource& source, const ConvertOptions& options)
      : source_(source), options_(options), pool_(options.threads > 0 ? options.threads : physical_cores()) {
    for (const Parameter& p : source.parameters) total_ += element_count(p.shape);
  }

  // False when the user's callback asked to stop.
  bool write(const std::string& path, const std::vector<Piece>& pieces) {
    std::vector<std::vector<std::byte>> buffers(pieces.size());
    std::vector<io::NamedTensor> tensors;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Parameter& p = source_.parameters[pieces[i].parameter];
      const auto stored = StoredParameter::find(source_.checkpoint, p, source_.config);
      const void* data = stored.dtype() == pieces[i].dtype ? stored.bytes() : nullptr;
      if (data == nullptr) {
        convert(stored, pieces[i].dtype, buffers[i]);
        data = buffers[i].data();
      }
      tensors.push_back({p.name, {pieces[i].dtype, p.shape, data}});
      done_ += element_count(p.shape);
      if (options_.progress && !options_.progress(done_, total_)) return false;
    }
    io::write_safetensors(path, tensors, {{"format", "pt"}});
    return true;
  }

 private:
  void convert(const StoredParameter& stored, Dtype dtype, std::vector<std::byte>& out) {
    const int64_t count = stored.elements();
    out.resize(dtype_bytes(dtype, count));
    pool_.parallel_for((count + kPiece - 1) / kPiece, [&](int64_t index, int) {
      const int64_t first = index * kPiece;
      const int64_t n = std::min(kPiece, count - first);
      std::vector<float> x(static_cast<size_t>(n));
      stored.read(first, n, x.data());
      try {
        quant::quantize(dtype, x.data(), n, out.data() + dtype_bytes(dtype, first));
      } catch (const Error& error) {
        fail("{}: in the elements from {} on: {}", stored.place(), first, error.what());
      }
    });
  }

  const ConvertSource& source_;
  const ConvertOptions& options_;
  ThreadPool pool_;
  int64_t total_ = 0;
  int64_t done_ = 0;
};

// Parameters in their order, in shards of about kShardBytes.
std::vector<std::vector<Piece>> divide(const ConvertSource& source, WeightType type, ConvertReport& report) {
  std::vector<std::vector<Piece>> shards(1);
  uint64_t bytes = 0;
  for (size_t i = 0; i < source.parameters.size(); ++i) {
    const Parameter& p = source.parameters[i];
    const int64_t elements = element_count(p.shape);
    const Dtype dtype = target_dtype(p, StoredParameter::find(source.checkpoint, p, source.config), type);
    const uint64_t size = dtype_bytes(dtype, elements);
    if (bytes > 0 && bytes + size > kShardBytes) {
      shards.emplace_back();
      bytes = 0;
    }
    bytes += size;
    shards.back().push_back({i, dtype});
    StoredShare& share = report.shares[dtype];
    ++share.tensors;
    share.elements += elements;
    share.bytes += size;
    report.target_bytes += size;
  }
  return shards;
}

void write_index(const ConvertSource& source, const std::vector<std::vector<Piece>>& shards,
                 const std::vector<std::string>& names, uint64_t bytes, io::OutputDirectory& out) {
  nlohmann::json map = nlohmann::json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const Piece& piece : shards[i]) map[source.parameters[piece.parameter].name] = names[i];
  }
  const nlohmann::json index = {{"metadata", {{"total_size", bytes}}}, {"weight_map", map}};
  out.write(kIndexFile, index.dump(1) + "\n");
}

std::string generation_config(const io::GgufFile& file, const Config& config) {
  if (file.has(kGgufGenerationConfigKey)) return file.get_string(kGgufGenerationConfigKey);
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (config.bos_id) json["bos_token_id"] = *config.bos_id;
  if (!config.eos_ids.empty()) json["eos_token_id"] = config.eos_ids;
  return json.dump(2) + "\n";
}

void write_tokenizer(const io::GgufFile& file, io::OutputDirectory& out, ConvertReport& report) {
  if (file.get_string("tokenizer.ggml.model", "none") == "none") {
    report.notes.emplace_back("the file has no tokenizer, so the directory has none");
    return;
  }
  const auto chat = text::gguf_chat_template(file);
  const auto made = text::hugging_face_tokenizer(text::parse_gguf_tokenizer(file), chat);
  out.write("tokenizer.json", made.tokenizer_json);
  out.write("tokenizer_config.json", made.tokenizer_config_json);
  // One for tools beside it has its place in tokenizer_config.json only.
  if (chat && !chat->tools) out.write("chat_template.jinja", chat->text);
}

}  // namespace

ConvertReport convert_to_hugging_face(const std::string& path, const std::string& directory,
                                      const ConvertOptions& options) {
  check(options.type == WeightType::kAuto || options.type == WeightType::kF32 ||
            options.type == WeightType::kBF16,
        "{}: safetensors files hold no quantised weights, expected type auto, f32 or bf16", directory);
  const ConvertSource source = ConvertSource::open(path, options.compatibility);
  const io::GgufFile* gguf = source.checkpoint.gguf();
  check(gguf != nullptr, "{}: is no GGUF file", path);
  ConvertReport report;
  report.source_bytes = source.checkpoint.total_bytes();
  const auto shards = divide(source, options.type, report);
  const bool quantized = std::any_of(source.dtypes.begin(), source.dtypes.end(), is_quantized);
  if (quantized && options.type != WeightType::kF32) {
    report.notes.emplace_back("quantised weights were written as bfloat16: what they lost stays lost");
  }

  io::OutputDirectory out(directory, options.overwrite);
  check_space(fs::path(directory) / "config.json", report.target_bytes);
  ShardWriter writer(source, options);
  std::vector<std::string> names;
  for (size_t i = 0; i < shards.size(); ++i) {
    names.push_back(shards.size() == 1
                        ? "model.safetensors"
                        : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size()));
    if (!writer.write(out.add(names.back()), shards[i])) {
      report.cancelled = true;
      return report;
    }
  }
  if (shards.size() > 1) write_index(source, shards, names, report.target_bytes, out);
  write_tokenizer(*gguf, out, report);
  out.write("generation_config.json", generation_config(*gguf, source.config));
  out.write("config.json", source.config_text);  // last: without it the directory is no model
  out.commit();
  return report;
}

}  // namespace kilin
