// SPDX-License-Identifier: Apache-2.0
#include "engine/weights.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "kernels/norm/norm.h"
#include "model/alternatives.h"

namespace kilin {
namespace {

struct Found {
  std::string name;
  TensorView view;  // of the parameter alone, if it is a part of a tensor
};

Found find_parameter(const io::Checkpoint& checkpoint, const Parameter& p, const Config& c) {
  for (const TensorSource& source : tensor_sources(p, c)) {
    const TensorView* stored = checkpoint.find(source.name);
    if (stored == nullptr) continue;
    check(same_shape(stored->shape, source.shape, p.role), "{}: tensor '{}': found shape {}, expected {}",
          checkpoint.path(), source.name, to_string(stored->shape), to_string(source.shape));
    check(stored->dtype == Dtype::kF32 || stored->dtype == Dtype::kF16 || stored->dtype == Dtype::kBF16,
          "{}: tensor '{}': found type {}, expected F32, F16 or BF16", checkpoint.path(), source.name,
          dtype_name(stored->dtype));
    TensorView part = *stored;
    part.shape = p.shape;
    part.data = static_cast<const std::byte*>(stored->data) +
                static_cast<size_t>(source.offset) * dtype_size(stored->dtype);
    return {source.name, part};
  }
  fail("{}: tensor '{}' is missing, expected with shape {}", checkpoint.path(), p.name, to_string(p.shape));
}

void check_all_used(const io::Checkpoint& checkpoint, const std::set<std::string>& used) {
  for (const std::string& name : checkpoint.names()) {
    // A table that older exporters store; it follows from the configuration.
    if (used.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    fail("{}: tensor '{}' belongs to no parameter of the model that config.json describes", checkpoint.path(),
         name);
  }
}

WeightMatrix as_matrix(const TensorView& view) {
  return {view.data, view.dtype, view.shape.at(0), view.elements() / view.shape.at(0)};
}

bool finite_tensor(const TensorView& view) {
  const int64_t n = view.elements();
  constexpr int64_t kPart = 1 << 14;
  std::vector<float> part(kPart);
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t count = std::min(kPart, n - i);
    const auto* at =
        static_cast<const std::byte*>(view.data) + static_cast<size_t>(i) * dtype_size(view.dtype);
    widen_row({at, view.dtype, 1, count}, 0, part.data());
    if (!all_finite(count, part.data())) return false;
  }
  return true;
}

}  // namespace

LoadedModel::LoadedModel(Config config)
    : config_(std::move(config)),
      weights_(config_),
      experts_(config_.layers.size()),
      shared_(config_.layers.size()) {}

float* LoadedModel::keep_floats(int64_t n) {
  floats_.emplace_back(static_cast<size_t>(n));
  return floats_.back().data();
}

Weight LoadedModel::bind(const Parameter& p, const TensorView& view) {
  if (p.role != Role::kVector && p.role != Role::kConv) return {as_matrix(view), nullptr};
  const int64_t n = view.elements();
  float* values = keep_floats(n);
  widen_row({view.data, view.dtype, 1, n}, 0, values);
  check(all_finite(n, values), "tensor '{}' holds NaN or infinity", p.name);
  if (p.role == Role::kVector) return {{}, values};
  const int64_t channels = view.shape.at(0);
  const int64_t taps = view.shape.at(2);
  float* transposed = keep_floats(n);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < taps; ++i) transposed[i * channels + c] = values[c * taps + i];
  }
  return {{}, transposed};
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

LoadedModel LoadedModel::load(Config config, io::Checkpoint checkpoint) {
  // The table of weights is sized by the configuration, so that has to be plausible first. A checkpoint that
  // merely lacks tensors gets the clearer message below.
  const double least_bytes = 2 * config.least_parameters();
  check(least_bytes <= 2 * static_cast<double>(checkpoint.total_bytes()) + 1e6,
        "{}: holds {} bytes of tensors, but config.json describes a model of at least {:.0f}",
        checkpoint.path(), checkpoint.total_bytes(), least_bytes);
  LoadedModel model(std::move(config));
  std::set<std::string> used;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight& w) {
    const Found found = find_parameter(checkpoint, p, model.config_);
    used.insert(found.name);
    model.table_.push_back({p, found.name, found.view});
    try {
      w = model.bind(p, found.view);
    } catch (const Error& e) {
      fail("{}: {}", checkpoint.path(), e.what());
    }
  });
  check_all_used(checkpoint, used);
  model.collect_experts();
  model.checkpoint_ = std::move(checkpoint);
  return model;
}

std::string LoadedModel::first_not_finite() const {
  for (const NamedWeight& w : table_) {
    if (!finite_tensor(w.view)) return w.source;
  }
  return "";
}

}  // namespace kilin
