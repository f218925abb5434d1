// SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/norm/norm.h"
#include "model/blocks.h"

namespace kilin {

Engine::Engine(LoadedModel model, const EngineOptions& options)
    : model_(std::move(model)),
      cache_(model_.config(), options.cache_type),
      pool_(options.threads > 0 ? options.threads : physical_cores(), options.pin_threads),
      ops_(model_, cache_, pool_, options.activations) {}

bool Engine::rounds_activations() const {
  const auto& table = model_.table();
  return std::any_of(table.begin(), table.end(), [&](const NamedWeight& w) {
    return w.view.shape.size() > 1 && rounds(w.view.dtype, ops_.activations());
  });
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
