// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cmath>

#include "base/error.h"
#include "base/random.h"
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

}  // namespace

LoadedModel LoadedModel::random(Config config, uint64_t seed) {
  const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  check(2 * config.least_parameters() <= memory,
        "random weights: the model takes at least {:.1f} GB, this machine has {:.1f}",
        2e-9 * config.least_parameters(), 1e-9 * memory);
  LoadedModel model(std::move(config));
  Random random(seed);
  visit_parameters(model.weights_, model.config_, [&](const Parameter& p, Weight& w) {
    model.random_.emplace_back(static_cast<size_t>(element_count(p.shape)));
    std::vector<BFloat16>& values = model.random_.back();
    if (p.role == Role::kVector) {
      for (BFloat16& v : values) v = to_bfloat16(initial_vector_value(p.name, random));
    } else {
      constexpr double kScale = 0.02 * 1.7320508075688772 * 2.0 / 65536.0;  // uniform with deviation 0.02
      for (size_t i = 0; i < values.size(); i += 4) {
        uint64_t bits = random.bits();
        for (size_t j = i; j < std::min(values.size(), i + 4); ++j, bits >>= 16) {
          values[j] =
              to_bfloat16(static_cast<float>((static_cast<double>(bits & 0xffff) - 32767.5) * kScale));
        }
      }
    }
    const TensorView view{Dtype::kBF16, p.shape, values.data()};
    model.table_.push_back({p, p.name, view});
    w = model.bind(p, view);
  });
  model.collect_experts();
  return model;
}

}  // namespace kilin
