// SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/error.h"
#include "kernels/mla/mla.h"
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

Activations activations(const LoadedModel& model, const EngineOptions& options) {
  if (options.activations) return *options.activations;
  return any_matrix(model, is_quantized) ? Activations::kRounded : Activations::kExact;
}

// Of the first MLA layer: all of a model are alike.
bool rounds_latent_attention(const LoadedModel& model, Activations activations) {
  const auto& layers = model.config().layers;
  const auto mla = std::find(layers.begin(), layers.end(), LayerKind::kMla);
  if (mla == layers.end()) return false;
  const auto layer = static_cast<int>(mla - layers.begin());
  return mla_rounds(model.latent_heads(layer).value_up.front().dtype, activations);
}

Dtype cache_type(const LoadedModel& model, const EngineOptions& options) {
  const bool rounds = rounds_latent_attention(model, activations(model, options));
  check(rounds || options.cache_type != Dtype::kBF16 || model.config().count(LayerKind::kMla) == 0,
        "cache type: found bf16, expected f16 or f32: latent attention of this model is not rounded on this "
        "machine (--activations)");
  return options.cache_type.value_or(rounds ? Dtype::kBF16 : Dtype::kF16);
}

}  // namespace

Engine::Engine(LoadedModel model, const EngineOptions& options)
    : model_(std::move(model)),
      cache_(model_.config(), cache_type(model_, options)),
      pool_(options.threads > 0 ? options.threads : physical_cores(), options.pin_threads),
      ops_(model_, cache_, pool_, activations(model_, options)) {}

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
