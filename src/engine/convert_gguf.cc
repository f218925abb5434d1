// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "engine/convert_source.h"
#include "engine/quantization_error.h"
#include "model/gguf_config.h"
#include "model/random_values.h"
#include "quant/formats.h"

namespace kilin {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements that one thread converts at a time
constexpr int64_t kChunk = 64 * kPiece;
static_assert(kPiece % 256 == 0);

// Of llama.cpp: what most tensors are; shown to the user, no more.
uint32_t file_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16:
      return 1;
    case Dtype::kQ4_0:
      return 2;
    case Dtype::kQ8_0:
      return 7;
    case Dtype::kQ5_0:
      return 8;
    case Dtype::kQ4_K:
      return 14;
    case Dtype::kQ6_K:
      return 18;
    case Dtype::kBF16:
      return 32;
    default:
      return 0;
  }
}

// Elements of the parameters, wherever they come from.
class Elements {
 public:
  virtual ~Elements() = default;
  // The next parameter that the calls below are about.
  virtual void choose(size_t parameter) = 0;
  virtual int64_t count() const = 0;
  // The stored bytes if they are `dtype`, in order; else nullptr.
  virtual const std::byte* bytes(Dtype dtype) const = 0;
  virtual void read(Content content, int64_t first, int64_t n, float* out) const = 0;  // thread-safe
  virtual std::string place() const = 0;
};

class StoredElements : public Elements {
 public:
  explicit StoredElements(const ConvertSource& source) : source_(source) {}
  void choose(size_t parameter) override {
    stored_ = StoredParameter::find(source_.checkpoint, source_.parameters[parameter], source_.config);
  }
  int64_t count() const override { return stored_->elements(); }
  const std::byte* bytes(Dtype dtype) const override {
    return stored_->dtype() == dtype ? stored_->bytes() : nullptr;
  }
  void read(Content content, int64_t first, int64_t n, float* out) const override {
    if (content == Content::kNegativeExp) return stored_->read_negative_exp(first, n, out);
    stored_->read(first, n, out);
  }
  std::string place() const override { return stored_->place(); }

 private:
  const ConvertSource& source_;
  std::optional<StoredParameter> stored_;
};

class RandomElements : public Elements {
 public:
  RandomElements(const std::vector<Parameter>& parameters, uint64_t seed)
      : parameters_(parameters), seed_(seed) {}
  void choose(size_t parameter) override { chosen_ = &parameters_[parameter]; }
  int64_t count() const override { return element_count(chosen_->shape); }
  const std::byte* bytes(Dtype) const override { return nullptr; }
  void read(Content content, int64_t first, int64_t n, float* out) const override {
    random_values(*chosen_, seed_, first, n, out);
    if (content != Content::kNegativeExp) return;
    for (int64_t i = 0; i < n; ++i) out[i] = -std::exp(out[i]);
  }
  std::string place() const override { return fmt::format("random tensor '{}'", chosen_->name); }

 private:
  const std::vector<Parameter>& parameters_;
  uint64_t seed_;
  const Parameter* chosen_ = nullptr;
};

// Writes the tensors of a plan one after the other.
class TensorWriter {
 public:
  TensorWriter(const Config& config, Elements& elements, const ConvertOptions& options, int64_t total,
               io::GgufWriter& writer)
      : config_(config),
        elements_(elements),
        options_(options),
        total_(total),
        writer_(writer),
        pool_(options.threads > 0 ? options.threads : physical_cores()),
        workers_(static_cast<size_t>(pool_.size())) {}

  // False when the user's callback asked to stop.
  bool write(const PlannedTensor& t) {
    const bool complete = write_parts(t);
    QuantizationSums tensor;
    for (Worker& worker : workers_) tensor.add(std::exchange(worker.lost, {}));
    if (!complete || tensor.value == 0) return complete;
    QuantizationSums& sums = sums_[t.dtype];
    sums.add(tensor);
    QuantizationLoss& loss = losses_[t.dtype];
    loss.relative = sums.relative();
    loss.of_bound = sums.of_bound;
    if (tensor.relative() > loss.worst) {
      loss.worst = tensor.relative();
      loss.worst_tensor = t.name;
    }
    return true;
  }

  const std::map<Dtype, QuantizationLoss>& losses() const { return losses_; }

 private:
  struct Worker {
    std::vector<float> values, again;
    QuantizationSums lost;  // of the tensor under way
  };

  bool write_parts(const PlannedTensor& t) {
    for (const size_t parameter : t.parameters) {
      elements_.choose(parameter);
      if (t.content == Content::kKeyRows || t.content == Content::kValueRows) return write_half(t);
      const std::byte* bytes = t.content == Content::kWhole ? elements_.bytes(t.dtype) : nullptr;
      if (!(bytes != nullptr ? copy(t, bytes) : convert(t))) return false;
    }
    return true;
  }

  bool report(int64_t elements) {
    done_ += elements;
    return !options_.progress || options_.progress(done_, total_);
  }

  bool copy(const PlannedTensor& t, const std::byte* bytes) {
    const int64_t count = elements_.count();
    for (int64_t first = 0; first < count; first += kChunk) {
      const int64_t n = std::min(kChunk, count - first);
      writer_.write(bytes + dtype_bytes(t.dtype, first), dtype_bytes(t.dtype, n));
      if (!report(n)) return false;
    }
    return true;
  }

  // quantize() with the place in front of its errors.
  void pack(const PlannedTensor& t, const float* x, int64_t first, int64_t n, std::byte* out,
            Worker& worker) const {
    try {
      quant::quantize(t.dtype, x, n, out);
    } catch (const Error& error) {
      fail("{}: in the elements from {} on: {}", elements_.place(), first, error.what());
    }
    if (is_quantized(t.dtype)) worker.lost.add(t.dtype, x, n, out, worker.again);
  }

  bool convert(const PlannedTensor& t) {
    const int64_t count = elements_.count();
    for (int64_t start = 0; start < count; start += kChunk) {
      const int64_t end = std::min(count, start + kChunk);
      buffer_.resize(dtype_bytes(t.dtype, end - start));
      pool_.parallel_for((end - start + kPiece - 1) / kPiece, [&](int64_t index, int thread) {
        const int64_t first = start + index * kPiece;
        const int64_t n = std::min(kPiece, end - first);
        Worker& worker = workers_[static_cast<size_t>(thread)];
        std::vector<float>& x = worker.values;
        x.resize(kPiece);
        elements_.read(t.content, first, n, x.data());
        pack(t, x.data(), first, n, buffer_.data() + dtype_bytes(t.dtype, first - start), worker);
      });
      writer_.write(buffer_.data(), buffer_.size());
      if (!report(end - start)) return false;
    }
    return true;
  }

  // One half of kv_b_proj, [heads * (nope + value)][latent]: small, so in one go.
  bool write_half(const PlannedTensor& t) {
    const MlaConfig& a = config_.mla;
    std::vector<float> whole(static_cast<size_t>(elements_.count()));
    elements_.read(Content::kWhole, 0, elements_.count(), whole.data());
    std::vector<float> half;
    half.reserve(static_cast<size_t>(element_count(t.shape)));
    for (int64_t head = 0; head < a.heads; ++head) {
      const float* k = whole.data() + head * (a.nope + a.value) * a.latent;
      const float* v = k + a.nope * a.latent;
      if (t.content == Content::kValueRows) {
        half.insert(half.end(), v, v + a.value * a.latent);
        continue;
      }
      for (int64_t column = 0; column < a.latent; ++column) {
        for (int64_t row = 0; row < a.nope; ++row) half.push_back(k[row * a.latent + column]);
      }
    }
    const auto n = static_cast<int64_t>(half.size());
    buffer_.resize(dtype_bytes(t.dtype, n));
    pack(t, half.data(), 0, n, buffer_.data(), workers_.front());
    writer_.write(buffer_.data(), buffer_.size());
    return report(n);
  }

  const Config& config_;
  Elements& elements_;
  const ConvertOptions& options_;
  int64_t total_;
  int64_t done_ = 0;
  io::GgufWriter& writer_;
  ThreadPool pool_;
  std::vector<Worker> workers_;
  std::map<Dtype, QuantizationSums> sums_;
  std::map<Dtype, QuantizationLoss> losses_;
  std::vector<std::byte> buffer_;
};

// The type of most elements.
Dtype main_dtype(const ConvertReport& report) {
  const auto at =
      std::max_element(report.shares.begin(), report.shares.end(),
                       [](const auto& a, const auto& b) { return a.second.elements < b.second.elements; });
  return at == report.shares.end() ? Dtype::kF32 : at->first;
}

void note_limits(const Config& config, ConvertReport& report) {
  const auto limits = beyond_llama_cpp(config);
  if (limits.empty()) return;
  report.notes.push_back(fmt::format("llama.cpp will not run this file (Kilin does): it knows no {}",
                                     fmt::join(limits, ", no ")));
}

void count_shares(const std::vector<PlannedTensor>& plan, ConvertReport& report) {
  for (const PlannedTensor& t : plan) {
    const int64_t elements = element_count(t.shape);
    StoredShare& share = report.shares[t.dtype];
    ++share.tensors;
    share.elements += elements;
    share.bytes += dtype_bytes(t.dtype, elements);
    report.target_bytes += dtype_bytes(t.dtype, elements);
    report.fallbacks += t.fell_back ? 1 : 0;
  }
}

void declare(const std::vector<PlannedTensor>& plan, const ConvertReport& report, io::GgufWriter& writer) {
  writer.add_uint32("general.file_type", file_type(main_dtype(report)));
  writer.add_uint32("general.quantization_version", 2);
  for (const PlannedTensor& t : plan) writer.add_tensor(t.name, t.dtype, t.shape);
}

int64_t total_elements(const std::vector<PlannedTensor>& plan) {
  int64_t total = 0;
  for (const PlannedTensor& t : plan) total += element_count(t.shape);
  return total;
}

// The data of all tensors; commits unless the user stops it.
void write_data(const std::vector<PlannedTensor>& plan, const Config& config, Elements& elements,
                const std::string& target, const ConvertOptions& options, io::GgufWriter& writer,
                ConvertReport& report) {
  check_space(target, report.target_bytes);
  TensorWriter tensors(config, elements, options, total_elements(plan), writer);
  for (const PlannedTensor& t : plan) {
    if (!tensors.write(t)) {
      report.cancelled = true;
      return;
    }
  }
  report.losses = tensors.losses();
  writer.commit();
}

}  // namespace

ConvertReport convert_to_gguf(const std::string& path, const std::string& target,
                              const ConvertOptions& options) {
  check_target_file(target, options.overwrite);
  const ConvertSource source = ConvertSource::open(path, options.compatibility);
  std::vector<PlannedTensor> plan = plan_gguf(source.parameters, source.config);
  bool quantized = false;
  for (PlannedTensor& t : plan) {
    const Dtype stored = source.dtypes[t.parameters.front()];
    quantized = quantized || is_quantized(stored);
    choose_dtype(options.type, stored, t);
  }
  ConvertReport report;
  report.source_bytes = source.checkpoint.total_bytes();
  count_shares(plan, report);
  note_limits(source.config, report);
  if (quantized && options.type != WeightType::kAuto) {
    report.notes.emplace_back("the source is quantised already: what it lost stays lost");
  }
  io::GgufWriter writer(target);
  write_gguf_config(source.config, source.config_text, writer);
  write_text_metadata(source, writer);
  declare(plan, report, writer);
  StoredElements elements(source);
  write_data(plan, source.config, elements, target, options, writer, report);
  return report;
}

ConvertReport random_gguf(const std::string& config_path, uint64_t seed, const std::string& target,
                          const ConvertOptions& options) {
  check_target_file(target, options.overwrite);
  const Config config = read_config_file(config_path, options.compatibility);
  check_table_size(config, config_path);
  const std::vector<Parameter> parameters = parameter_table(config);
  std::vector<PlannedTensor> plan = plan_gguf(parameters, config);
  for (PlannedTensor& t : plan) choose_dtype(options.type, Dtype::kBF16, t);
  ConvertReport report;
  count_shares(plan, report);
  note_limits(config, report);
  io::GgufWriter writer(target);
  write_gguf_config(config, io::MappedFile(config_path).text(), writer);
  writer.add_string("general.name", fmt::format("random weights, seed {}", seed));
  writer.add_string("tokenizer.ggml.model", "none");
  declare(plan, report, writer);
  RandomElements elements(parameters, seed);
  write_data(plan, config, elements, target, options, writer, report);
  return report;
}

}  // namespace kilin
