// SPDX-License-Identifier: Apache-2.0
#include "train/initial_values.h"

#include <cmath>

#include "base/random.h"
#include "model/random_values.h"

namespace kilin::train {
namespace {

constexpr double kDeviation = 0.02;  // initializer_range of the published configurations

Random random_of(const std::string& name, uint64_t seed) {
  return Random(mixed_bits(seed) ^ text_hash(name));
}

std::vector<float> uniform(Random random, int64_t n, double bound) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = static_cast<float>(random.uniform(-bound, bound));
  return values;
}

}  // namespace

std::vector<float> initial_values(const Parameter& p, uint64_t seed) {
  const int64_t n = element_count(p.shape);
  if (p.role == Role::kVector) {
    std::vector<float> values(static_cast<size_t>(n));
    random_values(p, seed, 0, n, values.data());
    return values;
  }
  Random random = random_of(p.name, seed);
  if (p.role == Role::kConv) return uniform(random, n, 1.0 / std::sqrt(static_cast<double>(p.shape.back())));
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = static_cast<float>(kDeviation * random.normal());
  return values;
}

std::vector<float> initial_lora_a(const std::string& name, int64_t rows, int64_t columns, uint64_t seed) {
  return uniform(random_of(name, seed), rows * columns, 1.0 / std::sqrt(static_cast<double>(columns)));
}

}  // namespace kilin::train
