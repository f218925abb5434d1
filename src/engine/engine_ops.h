// SPDX-License-Identifier: Apache-2.0
// The Ops adapter of inference on the CPU: tensors are arena memory, weights stay in the mapped file, states
// live in the Cache, verbs call kernels/.
#pragma once
#include <array>
#include <functional>
#include <string_view>

#include "base/thread_pool.h"
#include "engine/arena.h"
#include "engine/cache.h"
#include "engine/weights.h"
#include "model/batch.h"
#include "model/ops.h"

namespace kilin {

// [rows][width] floats without gaps, in the arena.
struct EngineTensor {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
};

using Observer = std::function<void(std::string_view what, int layer, const EngineTensor& x)>;

class EngineOps {
 public:
  using Tensor = EngineTensor;
  using Weight = kilin::Weight;

  EngineOps(const LoadedModel& model, Cache& cache, ThreadPool& pool, Activations activations)
      : model_(model), config_(model.config()), cache_(cache), pool_(pool), activations_(activations) {}

  Activations activations() const { return activations_; }
  // The batch and the arena's content are valid until the next begin().
  void begin(const Batch& batch);
  void set_observer(Observer observer) { observer_ = std::move(observer); }

  Tensor embed(const Weight& table);
  Tensor rms_norm(const Tensor& x, const Weight& w, double eps);
  Tensor linear(const Tensor& x, const Weight& w);
  template <size_t N>
  std::array<Tensor, N> linears(const Tensor& x, const std::array<const Weight*, N>& w) {
    std::array<Tensor, N> y;
    std::array<MatmulJob, N> jobs;
    for (size_t i = 0; i < N; ++i) jobs[i] = job(x, *w[i], y[i]);
    matmul(jobs, pool_, activations_);
    return y;
  }
  Tensor short_conv(const Tensor& x, const Weight* w, int layer, ConvStream stream);
  Tensor delta_mix(const MixInputs<Tensor, Weight>& in, int layer, LayerKind kind);
  Tensor gated_rms_norm(const Tensor& x, const Weight& w, const Tensor* z);
  Tensor mla_mix(const Tensor& q, const Tensor& kv, const MlaWeights<Weight>& w, int layer);
  Tensor swiglu(const Tensor& gate, const Tensor& up);
  Tensor moe(const Tensor& x, const MoeWeights<Weight>& w, int layer);
  void add_to(Tensor& x, const Tensor& y);
  Tensor wanted_rows(const Tensor& x);
  void observe(std::string_view what, int layer, const Tensor& x) {
    if (observer_) observer_(what, layer, x);
  }

  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
    ~Scope() { arena_.release(mark_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    Arena::Mark mark_;
  };
  Scope scope() { return Scope(arena_); }

 private:
  Tensor tensor(int64_t rows, int64_t width);
  MatmulJob job(const Tensor& x, const Weight& w, Tensor& y);
  Tensor router_logits(const Tensor& x, const Weight& w);
  void append_latents(const Tensor& kv, const MlaWeights<Weight>& w, int layer);
  const int64_t* positions() const { return positions_.data(); }

  const LoadedModel& model_;
  const Config& config_;
  Cache& cache_;
  ThreadPool& pool_;
  const Activations activations_;
  Arena arena_;
  Arena::Mark start_ = arena_.mark();
  Batch batch_;
  std::vector<int64_t> positions_;  // [rows]
  MoeScratch moe_scratch_;
  std::vector<int32_t> expert_ids_;
  std::vector<float> expert_weights_;
  Observer observer_;
};

static_assert(Ops<EngineOps>);

}  // namespace kilin
