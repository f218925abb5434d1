// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "base/thread_pool.h"
#include "engine/cache.h"
#include "engine/engine_ops.h"
#include "engine/weights.h"
#include "model/batch.h"

namespace kilin {

struct EngineOptions {
  int threads = 0;  // 0: the physical cores
  // Of MLA latents: kF16, kF32 to be exact, or kBF16, only where latent attention is rounded. None: kBF16
  // there (its rows need no conversion), else kF16.
  std::optional<Dtype> cache_type = {};
  bool pin_threads = false;  // bind threads to cores (base/thread_pool.h)
  // Of products, but for the router's, and of latent attention. None: rounded if a matrix is quantised.
  std::optional<Activations> activations = {};
};

// A loaded model, its cache and its threads: computes one batch at a time. Not thread-safe.
class Engine {
 public:
  Engine(LoadedModel model, const EngineOptions& options);

  const Config& config() const { return model_.config(); }
  const LoadedModel& model() const { return model_; }
  Cache& cache() { return cache_; }
  const Cache& cache() const { return cache_; }
  ThreadPool& pool() { return pool_; }
  int threads() const { return pool_.size(); }
  // Whether products with some of the weights round their activations (kernels/matmul/matmul.h).
  bool rounds_activations() const;

  // Moves the batch's sequences on. Returns logits [wanted rows][vocab], valid until the next call. Throws
  // Error if logits are not finite, naming the weight tensor to blame if there is one.
  std::span<const float> forward(const Batch& batch);

  void set_observer(Observer observer) { ops_.set_observer(std::move(observer)); }
  void set_check_finite(bool check) { check_finite_ = check; }

 private:
  LoadedModel model_;
  Cache cache_;
  ThreadPool pool_;
  EngineOps ops_;
  bool check_finite_ = true;
};

}  // namespace kilin
