// SPDX-License-Identifier: Apache-2.0
#include "engine/hugging_face_shards.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "io/safetensors_writer.h"
#include "quant/formats.h"

namespace kilin {
namespace {

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

Dtype target_dtype(const Parameter& p, const StoredParameter& stored, WeightType type, bool changed) {
  const bool matrix = p.role != Role::kVector && p.role != Role::kConv && p.role != Role::kRouter;
  if (matrix && type == WeightType::kF32) return Dtype::kF32;
  if (matrix && type == WeightType::kBF16) return Dtype::kBF16;
  if (is_quantized(stored.dtype())) return Dtype::kBF16;
  if (stored.dtype() == Dtype::kF32 && !changed && may_become_bfloat16(p) && all_bfloat16(stored))
    return Dtype::kBF16;
  return stored.dtype();
}

class ShardWriter {
 public:
  ShardWriter(const ConvertSource& source, const ConvertOptions& options, const LoraSet& lora)
      : source_(source),
        options_(options),
        lora_(lora),
        pool_(options.threads > 0 ? options.threads : physical_cores()) {
    for (const Parameter& p : source.parameters) total_ += element_count(p.shape);
  }

  // False when the user's callback asked to stop.
  bool write(const std::string& path, const std::vector<ShardPiece>& pieces) {
    std::vector<std::vector<std::byte>> buffers(pieces.size());
    std::vector<io::NamedTensor> tensors;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Parameter& p = source_.parameters[pieces[i].parameter];
      const auto stored = StoredParameter::find(source_.checkpoint, p, source_.config);
      const bool changed = lora_.changes(p);
      const void* data = !changed && stored.dtype() == pieces[i].dtype ? stored.bytes() : nullptr;
      if (data == nullptr) {
        if (changed) {
          add_adapters(stored, p, pieces[i].dtype, buffers[i]);
        } else {
          convert(stored, pieces[i].dtype, buffers[i]);
        }
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

  void add_adapters(const StoredParameter& stored, const Parameter& p, Dtype dtype,
                    std::vector<std::byte>& out) {
    std::vector<float> values(static_cast<size_t>(stored.elements()));
    stored.read(0, stored.elements(), values.data());
    lora_.add_to(p, values, pool_);
    out.resize(dtype_bytes(dtype, stored.elements()));
    quant::quantize(dtype, values.data(), stored.elements(), out.data());
  }

  const ConvertSource& source_;
  const ConvertOptions& options_;
  const LoraSet& lora_;
  ThreadPool pool_;
  int64_t total_ = 0;
  int64_t done_ = 0;
};

void write_index(const ConvertSource& source, const Shards& shards, const std::vector<std::string>& names,
                 uint64_t bytes, io::OutputDirectory& out) {
  nlohmann::json map = nlohmann::json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const ShardPiece& piece : shards[i]) map[source.parameters[piece.parameter].name] = names[i];
  }
  const nlohmann::json index = {{"metadata", {{"total_size", bytes}}}, {"weight_map", map}};
  out.write(kIndexFile, index.dump(1) + "\n");
}

}  // namespace

Shards divide_into_shards(const ConvertSource& source, WeightType type, const LoraSet& lora,
                          ConvertReport& report) {
  Shards shards(1);
  uint64_t bytes = 0;
  for (size_t i = 0; i < source.parameters.size(); ++i) {
    const Parameter& p = source.parameters[i];
    const int64_t elements = element_count(p.shape);
    const Dtype dtype =
        target_dtype(p, StoredParameter::find(source.checkpoint, p, source.config), type, lora.changes(p));
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

bool write_shards(const ConvertSource& source, const ConvertOptions& options, const Shards& shards,
                  const LoraSet& lora, uint64_t total_bytes, io::OutputDirectory& out) {
  ShardWriter writer(source, options, lora);
  std::vector<std::string> names;
  for (size_t i = 0; i < shards.size(); ++i) {
    names.push_back(shards.size() == 1
                        ? "model.safetensors"
                        : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size()));
    if (!writer.write(out.add(names.back()), shards[i])) return false;
  }
  if (shards.size() > 1) write_index(source, shards, names, total_bytes, out);
  return true;
}

}  // namespace kilin
