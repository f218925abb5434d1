// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "engine/weights.h"
#include "model/random_values.h"
#include "quant/formats.h"

namespace kilin {

LoadedModel LoadedModel::random(Config config, uint64_t seed, StoredValues values, int threads) {
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
  ThreadPool pool(threads > 0 ? threads : physical_cores());
  pool.parallel_for(static_cast<int64_t>(model.table_.size()), [&](int64_t i, int) {
    const Parameter& p = model.table_[static_cast<size_t>(i)].parameter;
    constexpr int64_t kPart = 4096;
    float part[kPart];
    const int64_t n = element_count(p.shape);
    for (int64_t first = 0; first < n; first += kPart) {
      const int64_t count = std::min(kPart, n - first);
      random_values(p, seed, first, count, part);
      quant::quantize(Dtype::kBF16, part, count, stored[static_cast<size_t>(i)].get() + first);
    }
  });
  size_t next = 0;
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight& w) {
    TensorView& view = model.table_[next++].view;
    model.bind_parameter(p, {view, Transform::kNone, {}}, w);
  });
  model.packed_.pack(pool);
  for (size_t i = 0; i < stored.size(); ++i) {
    if (values == StoredValues::kDrop && model.table_[i].parameter.role != Role::kEmbedding) {
      model.table_[i].view.data = nullptr;
    } else {
      model.random_values_.push_back(std::move(stored[i]));
    }
  }
  model.collect_experts();
  return model;
}

}  // namespace kilin
