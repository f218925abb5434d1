// SPDX-License-Identifier: Apache-2.0
#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/norm/norm.h"
#include "model/stored_parameter.h"
#include "quant/formats.h"

namespace kilin {
namespace {

const TensorView& checked(const io::Checkpoint& checkpoint, const std::string& name, const TensorView& stored,
                          const Shape& shape, Role role) {
  check(same_shape(stored.shape, shape, role), "{}: tensor '{}': found shape {}, expected {}",
        checkpoint.path(), name, to_string(stored.shape), to_string(shape));
  check(quant::readable(stored.dtype),
        "{}: tensor '{}': found type {}, expected F32, F16, BF16 or a quantised type", checkpoint.path(),
        name, dtype_name(stored.dtype));
  // same_shape() ignores dimensions of 1, so that the rows of the file may not be those of `shape`
  check(shape.back() % dtype_block(stored.dtype) == 0,
        "{}: tensor '{}': found type {}, which does not fit rows of {} elements", checkpoint.path(), name,
        dtype_name(stored.dtype), shape.back());
  return stored;
}

struct Found {
  std::string name, second_name;
  FoundTensor tensor;
};

Found find_parameter(const io::Checkpoint& checkpoint, const Parameter& p, const Config& c) {
  for (const TensorSource& source : tensor_sources(p, c)) {
    const TensorView* stored = checkpoint.find(source.name);
    if (stored == nullptr) continue;
    checked(checkpoint, source.name, *stored, source.shape, p.role);
    Found found{source.name, source.second_name, {*stored, source.transform, {}}};
    if (source.transform == Transform::kJoinHeads) {
      const TensorView* second = checkpoint.find(source.second_name);
      check(second != nullptr, "{}: tensor '{}' is missing, expected with shape {} beside '{}'",
            checkpoint.path(), source.second_name, to_string(source.second_shape), source.name);
      found.tensor.second = checked(checkpoint, source.second_name, *second, source.second_shape, p.role);
      return found;
    }
    KILIN_ASSERT(source.offset % dtype_block(stored->dtype) == 0);  // parts begin with a row
    found.tensor.view.shape = p.shape;
    found.tensor.view.data =
        static_cast<const std::byte*>(stored->data) + dtype_bytes(stored->dtype, source.offset);
    return found;
  }
  fail("{}: tensor '{}' is missing, expected with shape {}", checkpoint.path(), p.name, to_string(p.shape));
}

// The layer whose kv_b `w` is, or -1.
int latent_layer(const ModelWeights<Weight>& weights, const Weight& w) {
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    if (&weights.layers[i].mla.kv_b == &w) return static_cast<int>(i);
  }
  return -1;
}

void check_all_used(const io::Checkpoint& checkpoint, const std::set<std::string>& used) {
  for (const std::string& name : checkpoint.names()) {
    // A table that older exporters store; it follows from the configuration.
    if (used.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    fail("{}: tensor '{}' belongs to no parameter of the model that the configuration describes",
         checkpoint.path(), name);
  }
}

bool finite_tensor(const TensorView& view) {
  const int64_t n = view.elements();
  constexpr int64_t kPart = 1 << 14;  // a multiple of every block
  std::vector<float> part(kPart);
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t count = std::min(kPart, n - i);
    const auto* at = static_cast<const std::byte*>(view.data) + dtype_bytes(view.dtype, i);
    quant::dequantize(view.dtype, at, count, part.data());
    if (!all_finite(count, part.data())) return false;
  }
  return true;
}

std::vector<float> to_floats(const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.elements()));
  quant::dequantize(view.dtype, view.data, view.elements(), values.data());
  return values;
}

void apply(Transform transform, std::span<float> values) {
  if (transform != Transform::kLogOfNegative) return;
  for (float& x : values) {
    check(x < 0, "found {}, expected a negative decay -e^A_log", x);
    x = std::log(-x);
  }
}

// [rows][cols] of `values` from `at` on, transposed
std::vector<float> transposed(std::span<const float> values, int64_t rows, int64_t cols) {
  std::vector<float> out(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c)
      out[static_cast<size_t>(c * rows + r)] = values[static_cast<size_t>(r * cols + c)];
  }
  return out;
}

}  // namespace

LoadedModel::LoadedModel(Config config)
    : config_(std::move(config)),
      weights_(config_),
      experts_(config_.layers.size()),
      shared_(config_.layers.size()),
      latent_heads_(config_.layers.size()) {}

float* LoadedModel::keep_floats(int64_t n) {
  floats_.emplace_back(static_cast<size_t>(n));
  return floats_.back().data();
}

Weight LoadedModel::bind(const Parameter& p, const FoundTensor& found) {
  const TensorView& view = found.view;
  if (p.role != Role::kVector && p.role != Role::kConv) {
    Weight w;
    if (p.role == Role::kEmbedding) w.table = view;
    if (p.role != Role::kEmbedding || config_.tied_head) {
      w.matrix = packed_.add(view.dtype, view.data, view.shape.at(0), view.elements() / view.shape.at(0));
    }
    return w;
  }
  const int64_t n = view.elements();
  float* values = keep_floats(n);
  quant::dequantize(view.dtype, view.data, n, values);
  check(all_finite(n, values), "tensor '{}' holds NaN or infinity", p.name);
  try {
    apply(found.transform, {values, static_cast<size_t>(n)});
  } catch (const Error& e) {
    fail("tensor '{}': {}", p.name, e.what());
  }
  if (p.role == Role::kVector) return {{}, {}, values};
  const int64_t channels = view.shape.at(0);
  const int64_t taps = view.shape.at(2);
  float* by_tap = keep_floats(n);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < taps; ++i) by_tap[i * channels + c] = values[c * taps + i];
  }
  return {{}, {}, by_tap};
}

void LoadedModel::bind_parameter(const Parameter& p, const FoundTensor& found, Weight& w) {
  const int layer = latent_layer(weights_, w);
  if (layer >= 0) return bind_latent_heads(latent_heads_[static_cast<size_t>(layer)], found);
  w = bind(p, found);
}

void LoadedModel::bind_latent_heads(LatentHeads& heads, const FoundTensor& found) {
  const MlaConfig& c = config_.mla;
  const auto slice = [](const TensorView& view, int64_t first_row, int64_t cols) {
    return static_cast<const std::byte*>(view.data) + dtype_bytes(view.dtype, first_row * cols);
  };
  const bool joined = found.transform == Transform::kJoinHeads;
  for (int64_t h = 0; h < c.heads; ++h) {
    // One of the two forms of W_UK is stored; the other is its transpose in a type that holds it exactly.
    const TensorView& keys = found.view;
    const int64_t rows = joined ? c.latent : c.nope;
    const int64_t cols = joined ? c.nope : c.latent;
    const std::byte* key = slice(keys, joined ? h * c.latent : h * (c.nope + c.value), cols);
    const WeightMatrix stored = packed_.add(keys.dtype, key, rows, cols);
    const std::vector<float> values = to_floats({keys.dtype, {rows, cols}, key});
    const Dtype exact = is_quantized(keys.dtype) ? Dtype::kF32 : keys.dtype;
    const WeightMatrix turned = packed_.add(exact, transposed(values, rows, cols), cols, rows);
    heads.k_absorb.push_back(joined ? stored : turned);
    heads.k_expand.push_back(joined ? turned : stored);
    const TensorView& values_view = joined ? found.second : found.view;
    const int64_t first = joined ? h * c.value : h * (c.nope + c.value) + c.nope;
    heads.value_up.push_back(
        packed_.add(values_view.dtype, slice(values_view, first, c.latent), c.value, c.latent));
  }
}

void LoadedModel::collect_experts() {
  const auto mlp = [](const MlpWeights<Weight>& w) {
    return ExpertWeights{w.gate.matrix, w.up.matrix, w.down.matrix};
  };
  for (size_t i = 0; i < weights_.layers.size(); ++i) {
    if (!config_.sparse[i]) continue;
    for (const auto& expert : weights_.layers[i].moe.experts) experts_[i].push_back(mlp(expert));
    if (config_.moe.shared > 0) shared_[i] = mlp(weights_.layers[i].moe.shared);
  }
}

// Packed at once, so that one matrix at most is in memory twice.
void LoadedModel::bind_changed(const io::Checkpoint& checkpoint, const Parameter& p, Weight& w,
                               ThreadPool& pool) {
  const auto stored = StoredParameter::find(checkpoint, p, config_);
  std::vector<float> values(static_cast<size_t>(stored.elements()));
  stored.read(0, stored.elements(), values.data());
  lora_.add_to(p, values, pool);
  bind_parameter(p, {{Dtype::kF32, p.shape, values.data()}, Transform::kNone, {}}, w);
  packed_.pack(pool);
}

LoadedModel LoadedModel::load(Config config, io::Checkpoint checkpoint, int threads,
                              std::span<const LoraSource> lora) {
  // The table of weights is sized by the configuration, so that has to be plausible first. A checkpoint that
  // merely lacks tensors gets the clearer message below.
  const double least_bytes = config.least_parameters() / 2;  // four bits each
  check(least_bytes <= static_cast<double>(checkpoint.total_bytes()) + 5e5,
        "{}: holds {} bytes of tensors, but its configuration describes a model of at least {:.0f}",
        checkpoint.path(), checkpoint.total_bytes(), least_bytes);
  LoadedModel model(std::move(config));
  model.lora_ = LoraSet(lora, model.config_);
  ThreadPool pool(threads > 0 ? threads : physical_cores());
  std::set<std::string> used;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight& w) {
    const Found found = find_parameter(checkpoint, p, model.config_);
    const bool changed = model.lora_.changes(p);
    used.insert(found.name);
    if (!found.second_name.empty()) used.insert(found.second_name);
    if (changed) {
      model.table_.push_back({p, found.name, {Dtype::kF32, p.shape, nullptr}});
    } else {
      model.table_.push_back({p, found.name, found.tensor.view});
      if (!found.second_name.empty()) model.table_.push_back({p, found.second_name, found.tensor.second});
    }
    try {
      if (changed) {
        model.bind_changed(checkpoint, p, w, pool);
      } else {
        model.bind_parameter(p, found.tensor, w);
      }
    } catch (const Error& e) {
      fail("{}: {}", checkpoint.path(), e.what());
    }
  });
  check_all_used(checkpoint, used);
  model.packed_.pack(pool);
  checkpoint.advise(io::Access::kDontNeed);  // what is needed further is read anew from the system's cache
  model.collect_experts();
  model.checkpoint_ = std::move(checkpoint);
  return model;
}

std::string LoadedModel::first_not_finite() const {
  for (const NamedWeight& w : table_) {
    if (w.view.data != nullptr && !finite_tensor(w.view)) return w.source;
  }
  return "";
}

}  // namespace kilin
