// SPDX-License-Identifier: Apache-2.0
#include "model/random_values.h"

#include <algorithm>
#include <cmath>

#include "base/random.h"

namespace kilin {
namespace {

float vector_value(const std::string& name, double uniform) {
  if (name.ends_with("A_log")) return static_cast<float>(std::log(1 + 15 * uniform));
  if (name.ends_with("dt_bias")) {
    const double dt = 1e-3 * std::pow(100.0, uniform);
    return static_cast<float>(dt + std::log(-std::expm1(-dt)));  // the inverse of softplus
  }
  return name.ends_with("correction_bias") ? 0.0f : 1.0f;
}

}  // namespace

void random_values(const Parameter& p, uint64_t seed, int64_t first, int64_t n, float* out) {
  const uint64_t start = mixed_bits(seed) ^ text_hash(p.name);
  if (p.role == Role::kVector) {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t bits = mixed_bits(start + static_cast<uint64_t>(first + i));
      out[i] = vector_value(p.name, static_cast<double>(bits >> 11) * 0x1p-53);
    }
    return;
  }
  // Four values of 16 bits from each draw, in [-1, 1) sqrt(3) 0.02.
  constexpr float kScale = 0.02f * 1.7320508f * 2.0f / 65536.0f;
  for (int64_t i = 0; i < n;) {
    const int64_t index = first + i;
    uint64_t bits = mixed_bits(start + static_cast<uint64_t>(index / 4)) >> (index % 4 * 16);
    const int64_t end = std::min(n, i + 4 - index % 4);
    for (; i < end; ++i, bits >>= 16) {
      out[i] = (static_cast<float>(bits & 0xffff) - 32767.5f) * kScale;
    }
  }
}

}  // namespace kilin
