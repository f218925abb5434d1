// SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/norm/norm.h"
#include "model/blocks.h"

namespace kilin {
namespace {

template <class Test>
bool any_matrix(const LoadedModel& model, const Test& test) {
  const auto& table = model.table();
  return std::any_of(table.begin(), table.end(),
                     [&](const NamedWeight& w) { return w.view.shape.size() > 1 && test(w.view.dtype); });
}

Activations default_activations(const LoadedModel& model) {
  return any_matrix(model, is_quantized) ? Activations::kRounded : Activations::kExact;
}

}  // namespace

Engine::Engine(LoadedModel model, const EngineOptions& options)
    : model_(std::move(model)),
      cache_(model_.config(), options.cache_type),
      pool_(options.threads > 0 ? options.threads : physical_cores(), options.pin_threads),
      ops_(model_, cache_, pool_, options.activations.value_or(default_activations(model_))) {}

bool Engine::rounds_activations() const {
  return any_matrix(model_, [&](Dtype dtype) { return rounds(dtype, ops_.activations()); });
}

std::span<const float> Engine::forward(const Batch& batch) {
  ops_.begin(batch);
  const EngineTensor logits = model_forward(ops_, config(), model_.weights());
  const int64_t n = logits.rows * logits.width;
  if (check_finite_ && !all_finite(n, logits.data)) {
    const std::string tensor = model_.first_not_finite();
    if (!tensor.empty()) fail("tensor '{}' holds NaN or infinity: the model's logits are not finite", tensor);
    fail("the model's logits are not finite: float32 activations overflow with these weights and tokens");
  }
  return {logits.data, static_cast<size_t>(n)};
}

}  // namespace kilin
