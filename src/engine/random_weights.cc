// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "base/cpu.h"
#include "base/error.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "engine/weights.h"

namespace kilin {
namespace {

// Parameters that decide the dynamics get the values of the architecture's initialisation
// (flash-linear-attention's KDA layer): A = e^A_log uniform in [1, 16), time constants e^U between 0.001 and
// 0.1, norms 1.
float initial_vector_value(const std::string& name, Random& random) {
  if (name.ends_with("A_log")) return static_cast<float>(std::log(random.uniform(1.0, 16.0)));
  if (name.ends_with("dt_bias")) {
    const double dt = std::max(1e-4, std::exp(random.uniform(std::log(1e-3), std::log(0.1))));
    return static_cast<float>(dt + std::log(-std::expm1(-dt)));
  }
  return name.ends_with("correction_bias") ? 0.0f : 1.0f;
}

// Uniform with deviation 0.02, four values from each 64-bit draw of splitmix64 (quality is no matter here,
// speed is).
void fill_matrix(uint64_t seed, int64_t n, BFloat16* values) {
  constexpr float kScale = 0.02f * 1.7320508f * 2.0f / 65536.0f;
  for (int64_t i = 0; i < n; i += 4) {
    uint64_t bits = seed += 0x9e3779b97f4a7c15ull;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    bits ^= bits >> 31;
    for (int64_t j = i; j < std::min(n, i + 4); ++j, bits >>= 16) {
      values[j] = to_bfloat16((static_cast<float>(bits & 0xffff) - 32767.5f) * kScale);
    }
  }
}

}  // namespace

LoadedModel LoadedModel::random(Config config, uint64_t seed) {
  const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const auto check_fits = [&](double parameters) {
    check(2 * parameters <= 0.9 * memory,
          "random weights: the model takes at least {:.1f} GB, this machine has {:.1f}", 2e-9 * parameters,
          1e-9 * memory);
  };
  check_fits(config.least_parameters());  // before the table takes memory
  LoadedModel model(std::move(config));
  double parameters = 0;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight&) {
    parameters += static_cast<double>(element_count(p.shape));
  });
  check_fits(parameters);
  // Values as a checkpoint would hold them, given back once they are packed; the embedding table stays.
  std::vector<std::unique_ptr<BFloat16[]>> stored;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight&) {
    stored.push_back(std::make_unique_for_overwrite<BFloat16[]>(static_cast<size_t>(element_count(p.shape))));
    model.table_.push_back({p, p.name, {Dtype::kBF16, p.shape, stored.back().get()}});
  });
  // Every tensor has a seed of its own, so that the threads do not matter.
  ThreadPool pool(physical_cores());
  pool.parallel_for(static_cast<int64_t>(model.table_.size()), [&](int64_t i, int) {
    const Parameter& p = model.table_[static_cast<size_t>(i)].parameter;
    BFloat16* values = stored[static_cast<size_t>(i)].get();
    const int64_t n = element_count(p.shape);
    Random random(seed + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull);
    if (p.role != Role::kVector) return fill_matrix(random.bits(), n, values);
    for (int64_t j = 0; j < n; ++j) values[j] = to_bfloat16(initial_vector_value(p.name, random));
  });
  size_t next = 0;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight& w) {
    TensorView& view = model.table_[next++].view;
    model.bind_parameter(p, {view, Transform::kNone, {}}, w);
    if (p.role == Role::kEmbedding) model.random_table_ = std::move(stored[next - 1]);
  });
  model.packed_.pack(pool);
  for (NamedWeight& w : model.table_) {
    if (w.parameter.role != Role::kEmbedding) w.view.data = nullptr;
  }
  model.collect_experts();
  return model;
}

}  // namespace kilin
